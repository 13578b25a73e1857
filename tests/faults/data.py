"""Faults in what a training sees."""

from __future__ import annotations

from . import Fault

TESTS = "tests/core/training/data"
FOLDERS, BUCKETS, WINDOWS, CACHE, DATASET, ENCODERS, PREPARE = (
    f"starflow_core/training/data/{name}.py"
    for name in ("folders", "buckets", "windows", "cache", "dataset", "encoders", "prepare")
)

FAULTS = [
    # Files
    Fault(
        FOLDERS, "        seen.add(real)\n", "",
        "links in a circle are followed", f"{TESTS}/test_folders.py::test_links_in_a_circle_end",
    ),
    Fault(
        FOLDERS, "listed.text if listed else _caption_beside(path)", "_caption_beside(path) or listed and listed.text",
        "a caption beside a file comes before its list", f"{TESTS}/test_folders.py",
    ),
    Fault(
        FOLDERS, "        if path in listed:\n", "        if False:\n",
        "a second caption in a list replaces the first", f"{TESTS}/test_folders.py",
    ),
    # Windows
    Fault(
        BUCKETS, "(self.frames - Fraction(1, 2)) /", "self.frames /",
        "clips end after their last frame", f"{TESTS}/test_buckets.py",
    ),
    Fault(
        BUCKETS, "range(0, total - length + 1, stride)", "range(0, total - length, stride)",
        "the last window that fits is trimmed", f"{TESTS}/test_buckets.py",
    ),
    Fault(
        BUCKETS, "start + length <= source.at(", "start <= source.at(",
        "edits without the end of their source", f"{TESTS}/test_buckets.py",
    ),
    Fault(
        WINDOWS, "+ Fraction(1, 2)) for i", ") for i",
        "frames at a rate are earlier ones, not the nearest", f"{TESTS}/test_buckets.py",
    ),
    # Cache
    Fault(
        CACHE, 'if _sum_of(tensor) != file.metadata.get("crc32"):', "if False:",
        "a flipped bit in the cache is trained on", f"{TESTS}/test_cache.py",
    ),
    Fault(
        CACHE, ' or file.metadata.get("of") != _said(key)', "",
        "an entry of something else is used", f"{TESTS}/test_cache.py",
    ),
    Fault(
        CACHE, 'if not values["facts"]["error"]:', "if True:",
        "a file that couldn't be read once never can be", f"{TESTS}/test_cache.py",
    ),
    Fault(
        CACHE, 'places = [(size * i // PROBES, PROBE) for i in range(PROBES)]', "places = []",
        "weights that differ in the middle are taken for the same", f"{TESTS}/test_cache.py",
    ),
    # Plans
    Fault(
        DATASET, 'random.Random(f"{name}:{number}")', "random.Random(name)",
        "every round has the same order", f"{TESTS}/test_dataset.py",
    ),
    Fault(
        DATASET, "due * len(self._learned[s]) / total", "due / len(self._learned)",
        "samples of small buckets are seen more often", f"{TESTS}/test_dataset.py",
    ),
    Fault(
        DATASET, 'f"task:{seed}:{index}"', 'f"task:{seed}"',
        "every step practises the same task", f"{TESTS}/test_dataset.py",
    ),
    Fault(
        DATASET, "return self._groups(range(len(self)), True)", "return self._groups(range(len(self.samples)), True)",
        "held-out samples are learned from", f"{TESTS}/test_dataset.py",
    ),
    Fault(
        DATASET, '"text": not paired,', '"text": True,',
        "instructions are learned as descriptions", f"{TESTS}/test_dataset.py",
    ),
    Fault(
        DATASET, '"last_frame": min(frames, window - 1)', '"last_frame": frames',
        "a last frame and its clip are longer than the window", f"{TESTS}/test_dataset.py",
    ),
    Fault(
        DATASET, "return clip[:, 1:]", "return clip",
        "continuations hold a clip's first frame", f"{TESTS}/test_dataset.py",
    ),
    Fault(
        DATASET, '{"first_frame": 1, "last_frame": 1,', '{"last_frame": 1,',
        "given first frames are learned", f"{TESTS}/test_dataset.py",
    ),
    Fault(
        DATASET, '"text" if task == "extend" and rng.random() < PREFIX_DROP else task', "task",
        "every continuation has its prefix", f"{TESTS}/test_dataset.py",
    ),
    # Encoding
    Fault(
        PREPARE, "list(wanted.values())[rank::world]", "list(wanted.values())",
        "every process encodes everything", f"{TESTS}/test_prepare.py::test_several_processes_share_the_work",
    ),
    Fault(
        PREPARE, "if cache.content(path) != window.file:", "if False:",
        "a file that changes is stored under its old content",
        f"{TESTS}/test_prepare.py::test_a_file_that_changes_meanwhile_is_not_stored",
    ),
    Fault(
        ENCODERS, "replace(config, noise_std=settings.noise)", "config",
        "prompts speak of another noise", f"{TESTS}/test_prepare.py::test_other_settings_are_encoded_anew",
    ),
    Fault(
        PREPARE, "min(max(share, ordered[1]), ordered[-1])", "share",
        "small sets hold nothing out, or everything",
        f"{TESTS}/test_prepare.py::test_whole_files_are_held_out_by_their_content",
    ),
    Fault(
        "starflow_core/training/options.py", "            if near:\n", "            if False:\n",
        "unknown options aren't told the nearest", "tests/core/training/test_options.py",
    ),
]  # fmt: skip
