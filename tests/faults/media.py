"""Faults in media: pictures and clips in and out."""

from __future__ import annotations

from . import Fault

MEDIA, TESTS = "starflow_core/media", "tests/core/media"
OVERLAY, DRAWN = "starflow_core/media/overlay.py", "tests/core/media/test_overlay.py"

FAULTS = [
    Fault(
        f"{MEDIA}/pictures.py", "if count * width * height > max(", "if width * height > max(",
        "an animation's frames don't count in its size", f"{TESTS}/test_unreadable_files.py",
    ),
    Fault(
        f"{MEDIA}/pictures.py", ".addHandler(logging.NullHandler())", "",
        "what Pillow logs is printed", f"{TESTS}/test_unreadable_files.py",
    ),
    Fault(
        f"{MEDIA}/videos.py", "codec.best - codec.worst) * recording.quality", "codec.worst - codec.best) * 0",
        "quality of a video ignored", f"{TESTS}/test_writing.py",
    ),
    Fault(
        f"{MEDIA}/videos.py", "self.sound.samples[:, self.done : stop]", "self.sound.samples[:, self.done :]",
        "a sound longer than its clip isn't cut", f"{TESTS}/test_writing.py",
    ),
    Fault(
        f"{MEDIA}/videos.py", "            container.mux(track.next())\n", "            pass\n",
        "no sound in a video", "tests/nodes/test_video.py",
    ),
    Fault(
        f"{MEDIA}/videos.py", "            container.mux(track.stream.encode(None))\n", "            pass\n",
        "the end of a sound is lost", f"{TESTS}/test_writing.py",
    ),
    Fault(
        f"{MEDIA}/videos.py", '            stream.codec_tag = codec.tag\n', "            pass\n",
        "an h265 that Apple's players refuse", "tests/nodes/test_video.py",
    ),
    Fault(
        f"{MEDIA}/animations.py", "max(recording.plays - 1, 0)", "recording.plays",
        "a gif plays once too often", "tests/nodes/test_video.py",
    ),
    Fault(
        f"{MEDIA}/videos.py", "**codec.options, **_BT709,", "**codec.options,",
        "a video's colour tags left out", f"{TESTS}/test_writing.py {TESTS}/test_round_trips.py",
    ),
    Fault(
        f"{MEDIA}/videos.py", "stream.average_rate or stream.guessed_rate or 0", "stream.guessed_rate or 0",
        "a varying rate guessed instead of averaged", f"{TESTS}/test_foreign_files.py",
    ),
    Fault(
        f"{MEDIA}/videos.py", "np.rot90(array, first.rotation // 90)", "array",
        "a video's rotation ignored", f"{TESTS}/test_foreign_files.py",
    ),
    Fault(
        f"{MEDIA}/videos.py", 'mode="edge"', 'mode="constant"',
        "odd sizes padded with black", f"{TESTS}/test_round_trips.py",
    ),
    Fault(
        f"{MEDIA}/videos.py", "        check_complete(path)\n", "",
        "truncated videos read as shorter ones", f"{TESTS}/test_unreadable_files.py",
    ),
    Fault(
        f"{MEDIA}/animations.py", "round(frame * steps / rate) for frame", "frame * round(steps / rate) for frame",
        "errors of an animation's durations add up", f"{TESTS}/test_writing.py {TESTS}/test_round_trips.py",
    ),
    Fault(
        f"{MEDIA}/animations.py", "animated | (has_exif if exif else 0)", "animated",
        "a webp doesn't say that it has metadata", f"{TESTS}/test_round_trips.py {TESTS}/test_writing.py",
    ),
    Fault(
        f"{MEDIA}/pictures.py", "(colour * (alpha / 255)).round().astype(np.uint8)", "colour",
        "transparency ignored", f"{TESTS}/test_foreign_files.py",
    ),
    Fault(
        f"{MEDIA}/pictures.py", "    if orientation > 4:", "    if orientation > 5:",
        "one EXIF orientation not turned", f"{TESTS}/test_foreign_files.py",
    ),
    Fault(
        f"{MEDIA}/pixels.py", "scale = max(ratios) if", "scale = min(ratios) if",
        "a picture fitted inside instead of covering", f"{TESTS}/test_fit.py",
    ),
    Fault(
        f"{MEDIA}/pixels.py", "add(1).mul_(127.5).round_()", "add(1).mul_(127.5)",
        "levels cut off instead of rounded", f"{TESTS}/test_round_trips.py {TESTS}/test_writing.py",
    ),
    Fault(
        f"{MEDIA}/writing.py", "            remove(self._recording.part)\n", "            pass\n",
        "a part left behind", f"{TESTS}/test_writing.py {TESTS}/test_sequences.py",
    ),
    Fault(
        f"{MEDIA}/metadata.py", "_COMFYUI_TAGS = {\"prompt\": 0x0110", "_COMFYUI_TAGS = {\"prompt\": 0x010E",
        "ComfyUI's prompt in another EXIF tag", f"{TESTS}/test_round_trips.py {TESTS}/test_writing.py",
    ),
    Fault(OVERLAY, "rows = np.linspace(1, 0,", "rows = np.linspace(0, 1,",
          "the scale's colours are upside down", DRAWN),
    Fault(OVERLAY, "round(top + (1 - float(", "round(top + (float(",
          "the scale's numbers are upside down", DRAWN),
    Fault(OVERLAY, "frames = frames.repeat(factor, 1).repeat(factor, 2)",
          "frames = frames.repeat(factor, 2).repeat(factor, 2)", "enlarged one way", DRAWN),
    Fault(OVERLAY, "cover = OPAQUE * share[..., None] ** 0.6", "cover = OPAQUE",
          "the clip doesn't show through", DRAWN),
]  # fmt: skip
