"""The commands and their options. Imports nothing heavy, so that help is quick."""

from __future__ import annotations

import argparse
import math
import os
import re
from fractions import Fraction
from typing import NoReturn

from ..errors import InputError
from ..jobs import CACHES, HOLDS, OFFLOADS
from ..training.options import NearestNameParser, add_settings, whole
from ..weights import WEIGHT_TYPES

PARALLEL = ("guidance", "tensor", "guidance,tensor")
INT8_HELP = "int8: the large weights in 8 bit"
DEVICE_HELP = "cpu, cuda, cuda:1, mps, .. (default: the best available)"


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = NearestNameParser(
        prog="python -m starflow_core",
        description="STARFlow and STARFlow-V: text to image and video with normalising flows.",
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, build, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        command.set_defaults(module=module)
        build(command)
    return root


def _generate(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "prompt", nargs="*", metavar="PROMPT", help="what to show; several prompts make one result each"
    )
    command.add_argument("--prompt-file", metavar="FILE", help="prompts, one per line, instead of PROMPT")
    _add_job(command)
    _add_spread(command.add_argument_group("several devices"))
    _add_video_output(command)
    _add_resume(command)


def _batch(command: argparse.ArgumentParser) -> None:
    command.usage = "%(prog)s JOBS.jsonl -o FOLDER [--OPTION VALUE ..]"  # all of them would fill a page
    command.description = (
        "Makes a result for each row of JOBS.jsonl, a JSON object whose fields are options of `generate`, such as "
        '{"prompt": "a red circle", "frames": 17, "seed": 3, "output": "a.mp4"}; options given here count for rows '
        "that say nothing else. What is in FOLDER already is left alone, so that the same command goes on where it "
        "was stopped. Several devices: torchrun --nproc-per-node N -m starflow_core batch .., or --ray. Exits with 3 "
        "if rows failed; FOLDER/failed.jsonl lists them."
    )
    command.add_argument("jobs", metavar="JOBS.jsonl", help="a file, or an address that fsspec reads, as s3://..")
    command.add_argument(
        "-o", "--output", dest="folder", required=True, metavar="FOLDER",
        help="where results go; names in rows are relative to it. An address that fsspec writes works, too",
    )  # fmt: skip
    command.add_argument(
        "--retries", type=whole, default=2, metavar="N", help="how often a row that fails is tried again (default: 2)"
    )
    command.add_argument(
        "--ray", metavar="ADDRESS", help="share rows out by Ray: auto, local, or a cluster's address (needs ray[data])"
    )
    command.add_argument(
        "--workers", type=_positive, metavar="N", help="of Ray (default: one for each GPU; without GPUs one)"
    )
    _add_job(command)
    _add_quality(command.add_argument_group("output"))
    _add_resume(command)


class RowParser(argparse.ArgumentParser):
    """Reads the fields of a batch's row as options of `generate`. Raises InputError in place of leaving."""

    def __init__(self):
        super().__init__(add_help=False, allow_abbrev=False)
        _generate(self)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _add_job(command: argparse.ArgumentParser) -> None:
    """All of `generate` but its prompts and where its results go."""
    command.add_argument(
        "--timeline", metavar="TEXT",
        help="instead of PROMPT: prompts that change in the clip, as '0s: a red circle moving right | 2s: a red circle "
        "moving up'; with --task extend the seconds begin with the frames that are seen of the source",
    )  # fmt: skip
    command.add_argument("--negative", default="", metavar="TEXT", help="what guidance steers away from")

    given = command.add_argument_group("given frames", "Without --aspect, their nearest trained ratio is used.")
    given.add_argument("--image", metavar="FILE", help="first frame")
    given.add_argument("--last-image", metavar="FILE", help="last frame")
    given.add_argument("--video", metavar="FILE", help="clip to extend or edit; its frame rate is kept")
    given.add_argument("--task", choices=("extend", "edit"), help="what to do with --video")
    given.add_argument("--join", action="store_true", help="extend: write the source, then the new frames")

    job = command.add_argument_group("what to make", "Defaults come from the model; `inspect` shows them.")
    job.add_argument(
        "--frames",
        type=whole,
        metavar="N",
        help="1 makes an image; for extend this includes the frames kept; edit reads this much of its source",
    )
    _add_size(job)
    job.add_argument("--fps", type=_rate, metavar="RATE", help="frames per second, such as 16, 23.976 or 30000/1001")
    job.add_argument("--guidance", type=float, metavar="W", help="0 is off, like CFG 1 for a diffusion model")
    job.add_argument("--seed", type=whole, default=0, help="result i uses seed + i (default: 0)")
    job.add_argument(
        "--batch",
        type=_positive,
        metavar="N",
        help="how many to make at once; one prompt gives N results, several are taken N at a time (default: 1)",
    )
    job.add_argument(
        "--best-of",
        type=_positive,
        metavar="N",
        help="look at how N candidates begin, --batch at a time, and make the one that the model finds likeliest; "
        "result i tries the seeds from seed + i N on",
    )
    job.add_argument(
        "--window",
        type=whole,
        metavar="N",
        help="latent frames attended to at once; in longer clips the window slides",
    )
    job.add_argument(
        "--keep", type=whole, metavar="N", help="latent frames kept when the window slides, or seen by extend"
    )
    job.add_argument(
        "--keep-at-change", type=whole, metavar="N",
        help="latent frames kept where --timeline changes the prompt; more make a smoother change, which is followed "
        "less (default: 1)",
    )  # fmt: skip
    job.add_argument(
        "--change-kept", action=argparse.BooleanOptionalAction,
        help="bring these frames under the new prompt first (default), as another colour, kind or background needs; "
        "without it, another direction is followed best",
    )  # fmt: skip
    job.add_argument(
        "--denoise",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="remove the noise that the model was trained with (default)",
    )

    _add_solver(command, "balanced")
    _add_model(command)
    _add_memory(command.add_argument_group("memory", "The fastest way that fits is chosen, and told before it starts."))


def _encode(command: argparse.ArgumentParser) -> None:
    command.description += (
        " Encodes the latents as they are, though the flow was trained on noisy ones, and prints their log-likelihood "
        "and bits per dimension. With --seed the model's own noise is added to them first, so that the result is like "
        "fresh noise and can be blended with it."
    )
    _add_input(command)
    command.add_argument("--seed", type=whole, metavar="N", help="add the model's own noise first, drawn from it")
    command.add_argument("--guidance", type=float, metavar="W", help="of the sampling that is inverted (default: 0)")
    command.add_argument("--negative", default="", metavar="TEXT", help="what that guidance steers away from")
    _add_windows(command)
    _add_model(command)
    command.add_argument(
        "-o", "--output", metavar="FILE", help=".safetensors file (default: outputs/INPUT.safetensors)"
    )


def _add_spread(group) -> None:
    group.add_argument(
        "--devices", metavar="A,B[,C]",
        help="several devices for one result, as cuda:0,cuda:1: with guidance its two halves are on the first two, "
        "without it the deep block is on the first; all else is on the last",
    )  # fmt: skip
    group.add_argument(
        "--parallel", choices=PARALLEL,
        help="each result by all processes that torchrun has started: the two halves of guidance, the heads of the "
        "deep block (tensor), or both: torchrun --nproc-per-node N -m starflow_core generate ..",
    )  # fmt: skip


def _add_windows(command: argparse.ArgumentParser) -> None:
    command.add_argument("--window", type=whole, metavar="N", help="latent frames attended to at once")
    command.add_argument("--keep", type=whole, metavar="N", help="latent frames kept when the window slides")


def _decode(command: argparse.ArgumentParser) -> None:
    command.description += " Uses the prompt, guidance, frame rate and size stored in the file."
    command.add_argument("input", metavar="NOISE", help="file written by encode or mix")
    command.add_argument("--prompt", metavar="TEXT", help="another prompt for the same noise")
    command.add_argument("--guidance", type=float, metavar="W", help="another guidance than the file's")
    _add_solver(command, "exact")
    _add_model(command)
    _add_memory(command.add_argument_group("memory", "The fastest way that fits is chosen, and told before it starts."))
    _add_video_output(command)


def _mix(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Of one noise makes a variation, by blending it with fresh noise; of two makes one between them, on the arc. "
        "Noise that is to be varied has to be encoded with --seed."
    )
    command.add_argument("input", nargs="+", metavar="NOISE", help="one or two files written by encode or mix")
    command.add_argument(
        "--amount", type=float, default=0.35, metavar="X",
        help="how much of the fresh or the second noise, 0 to 1 (default: 0.35)",
    )  # fmt: skip
    command.add_argument("--seed", type=whole, metavar="N", help="of the fresh noise (default: 0)")
    command.add_argument(
        "--keep-frames", type=whole, default=0, metavar="N", help="latent frames at the start that stay (default: 0)"
    )
    command.add_argument("-o", "--output", metavar="FILE", help=".safetensors file (default: in outputs/)")


def _reprompt(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Finds the noise of a clip under the caption that it has, and samples it under another one: what the caption "
        "says changes, the rest stays. Several candidates are compared, and the best is kept."
    )
    _add_input(command, described="--was")
    command.add_argument("new", metavar="PROMPT", help="what it shall show, all of it")
    command.add_argument("--negative", default="", metavar="TEXT", help="what guidance steers away from")
    command.add_argument(
        "--hold", choices=HOLDS, default="clip",
        help="what stays: the whole clip, or its first frame alone, as for another motion (default: clip)",
    )  # fmt: skip
    command.add_argument(
        "--strength",
        type=float,
        default=1.0,
        metavar="X",
        help="how strongly to hold on to the whole clip, 0 to 1 (default: 1)",
    )
    command.add_argument("--guidance", type=float, metavar="W", help="(default: 0 for the clip, 3 for its first frame)")
    command.add_argument("--candidates", type=_positive, default=1, metavar="N", help="how many to make (default: 1)")
    command.add_argument("--seed", type=whole, default=0, help="of the candidates after the first (default: 0)")
    _add_solver(command, "balanced")
    _add_model(command)
    _add_video_output(command)


def _fill(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Fills parts of a picture or clip, what is around it, or missing frames. Everything else stays as it is, to "
        "the bit in .png and folders of pictures. Give --mask, --outpaint or --missing, or several of them."
    )
    command.add_argument("input", metavar="INPUT", help="picture or clip; it is scaled to cover the size, then cropped")
    command.add_argument("prompt", metavar="PROMPT", help="what all of the result shows, known parts included")
    command.add_argument(
        "--mask", metavar="FILE",
        help="picture, or clip with as many frames, of the input's size: black stays, anything brighter is filled",
    )  # fmt: skip
    command.add_argument(
        "--outpaint",
        type=_margins,
        metavar="LEFT,TOP,RIGHT,BOTTOM",
        help="pixels of the input to add on each side; without another option for it, this is the size of the result",
    )
    command.add_argument(
        "--missing", type=_frame_range, metavar="FIRST-LAST", help="frames to fill, counted from 0; both included"
    )
    command.add_argument("--frames", type=_positive, metavar="N", help="use only the first N frames")
    command.add_argument("--fps", type=_rate, metavar="RATE", help="frames per second (default: the clip's)")
    _add_size(command)
    command.add_argument("--negative", default="", metavar="TEXT", help="what guidance steers away from")
    command.add_argument("--guidance", type=float, metavar="W", help="(default: the model's own)")
    command.add_argument(
        "--particles", type=_positive, metavar="N",
        help="samples that go side by side: the more, the better it fits, the longer it takes (default: 8, or as many "
        "as fit in memory)",
    )  # fmt: skip
    command.add_argument("--seed", type=whole, default=0, help="determines the noise (default: 0)")
    command.add_argument("--window", type=whole, metavar="N", help="latent frames attended to at once in a long clip")
    command.add_argument("--keep", type=whole, metavar="N", help="latent frames kept when the window slides")
    _add_solver(command, "balanced")
    _add_model(command)
    _add_video_output(command)


def _score(command: argparse.ArgumentParser) -> None:
    command.description += (
        " Scores the latents without adding noise, though the flow was trained on noisy ones. A token's surprise is "
        "minus its log density given what comes before it."
    )
    _add_input(command)
    command.add_argument(
        "--choose", nargs="+", metavar="CAPTION", help="instead of --prompt: which of these captions fits best"
    )
    command.add_argument(
        "--map", metavar="FILE",
        help="write the clip with its surprise on top (with --choose the winner's); formats as of generate",
    )  # fmt: skip
    _add_windows(command)
    _add_model(command)
    _add_json(command, "print JSON, with the surprise by frame")


def _convert(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="SOURCE", help=".pth, .safetensors, an index of shards, or a folder")
    command.add_argument("target", metavar="TARGET", help="the .safetensors file to write")
    command.add_argument("--dtype", choices=WEIGHT_TYPES, default="bf16", help=f"{INT8_HELP} (default: bf16)")
    command.add_argument("--overwrite", action="store_true", help="replace TARGET if it exists")


def _merge(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Adds LoRAs to a checkpoint's weights, in float32, and writes it as one .safetensors file. Small differences "
        "are lost in part when the sum is rounded to bf16, and more so to int8; generate --lora keeps them apart."
    )
    command.add_argument("source", metavar="MODEL", help=".pth, .safetensors, an index of shards, or a folder")
    command.add_argument("loras", nargs="+", type=_lora, metavar="LORA[:STRENGTH]", help="(default strength: 1)")
    command.add_argument("-o", "--output", required=True, metavar="FILE", help="the .safetensors file to write")
    command.add_argument("--dtype", choices=WEIGHT_TYPES, default="bf16", help=f"{INT8_HELP} (default: bf16)")
    command.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")


def _inspect(command: argparse.ArgumentParser) -> None:
    command.description += " Reads no weights. For a picture or clip made with this program, shows how it was made."
    command.add_argument(
        "model", nargs="?", metavar="FILE", help="checkpoint, LoRA, picture or clip (default: the bundled demo)"
    )
    job = command.add_argument_group("memory of a job")
    job.add_argument("--frames", type=whole, metavar="N")
    _add_size(job)
    job.add_argument("--batch", type=whole, default=1, metavar="N")
    job.add_argument("--guidance", type=float, metavar="W")
    job.add_argument("--dtype", choices=WEIGHT_TYPES, help="only this type (default: all but fp16)")
    _add_memory(job)
    job.add_argument("--device", metavar="NAME", help=f"device whose free memory to show: {DEVICE_HELP}")
    _add_json(command)


def _prepare(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Finds pictures and clips with captions, brings them to trained sizes and lengths, and encodes them into "
        "WORK/cache, once; training does the same before it starts. Tells what is cropped, trimmed and left out."
    )
    command.add_argument("--preview", metavar="FILE", help="write a contact sheet of what the model will see (.png)")
    add_settings(command)


def _train(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Teaches a model something from a folder of pictures or clips with captions, and writes one file: a LoRA for "
        "generate --lora, or a whole model. Run again, it goes on from the last state in WORK. Several devices and "
        "machines: torchrun --nproc-per-node N -m starflow_core train .."
    )
    command.add_argument("--example", action="store_true", help="print a settings file with every field, and stop")
    command.add_argument("--dry-run", action="store_true", help="tell the memory that each size needs, and stop")
    add_settings(command)


COMMANDS = {
    "generate": ("generate", _generate, "make images or clips from text, pictures and clips"),
    "batch": ("batch", _batch, "make many results, one for each row of a file, on one device or many"),
    "encode": ("invert", _encode, "turn a picture or clip into the noise that makes it"),
    "decode": ("invert", _decode, "turn encoded noise back into its picture or clip"),
    "mix": ("invert", _mix, "vary a noise, or mix two"),
    "reprompt": ("reprompt", _reprompt, "change a clip by another prompt for its noise"),
    "fill": ("fill", _fill, "fill parts of a picture or clip, what is around it, or missing frames"),
    "score": ("invert", _score, "print how likely a picture or clip is, in nats and bits per dimension"),
    "prepare": ("prepare", _prepare, "encode pictures and clips with captions for training"),
    "train": ("train", _train, "teach a model something: a LoRA, or all of it"),
    "convert": ("files", _convert, "write a checkpoint as one .safetensors file"),
    "merge": ("files", _merge, "add LoRAs to a checkpoint's weights"),
    "inspect": ("files", _inspect, "show what a checkpoint contains, and how much memory a job needs"),
}


def _add_size(group) -> None:
    group.add_argument("--aspect", metavar="W:H", help="aspect ratio, such as 16:9")
    group.add_argument("--size", type=_positive, metavar="PIXELS", help="side of a square of the same area")
    group.add_argument("--height", type=whole, metavar="PIXELS", help="with --width, instead of --aspect and --size")
    group.add_argument("--width", type=whole, metavar="PIXELS")


def _add_input(command: argparse.ArgumentParser, described: str = "--prompt") -> None:
    command.add_argument("input", metavar="INPUT", help="picture or clip; it is scaled to cover the size, then cropped")
    command.add_argument(described, dest="prompt", default="", metavar="TEXT", help="what it shows (default: empty)")
    command.add_argument("--frames", type=_positive, metavar="N", help="use only the first N frames")
    command.add_argument("--fps", type=_rate, metavar="RATE", help="frames per second (default: the clip's)")
    _add_size(command)


def _add_solver(command: argparse.ArgumentParser, preset: str) -> None:
    group = command.add_argument_group(
        "solver", "Presets set tolerances, spans suit the device; each can be overridden."
    )
    group.add_argument("--solver", choices=("jacobi", "autoregressive"), default="jacobi", help="(default: jacobi)")
    group.add_argument("--preset", choices=("fast", "balanced", "exact"), help=f"(default: {preset})")
    group.add_argument(
        "--image-span", type=whole, metavar="N",
        help="tokens solved at once in an image, at most (default: as suits the device)",
    )  # fmt: skip
    group.add_argument("--first-span", type=whole, metavar="N", help="the same for the first frame of a clip")
    group.add_argument("--span", type=whole, metavar="N", help="the same for the frames after it")
    group.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="relative squared change below which a token settles (in bf16 at least 0.003)",
    )
    group.add_argument("--shallow-tolerance", type=float, metavar="X", help="the same for frames in shallow blocks")
    group.add_argument("--max-sweeps", type=whole, metavar="N", help="sweeps after which a token counts as settled")
    group.add_argument(
        "--compile", action="store_true",
        help="compile what a sweep computes, which takes about a minute the first time; for one device that has all "
        "weights, keys and values",
    )  # fmt: skip
    command.set_defaults(default_preset=preset)


def _add_model(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("model", "Without --model, the bundled demo is used.")
    group.add_argument(
        "--model", metavar="PATH", help="checkpoint: .safetensors, .pth, an index of shards, or a folder"
    )
    group.add_argument(
        "--text-encoder", metavar="PATH", help="flan-t5-xl: a folder, or a file with tokenizer.json next to it"
    )
    group.add_argument("--vae", metavar="PATH", help="the model's VAE: a file or a diffusers folder")
    group.add_argument("--device", metavar="NAME", help=DEVICE_HELP)
    group.add_argument(
        "--dtype",
        choices=("auto", *WEIGHT_TYPES),
        default="auto",
        help="type of the networks (auto: bf16, but fp32 for small models on a CPU, and on one that can't multiply in "
        f"bf16); {INT8_HELP}, in flow and text encoder, computing as auto does",
    )
    group.add_argument(
        "--lora", action="append", type=_lora, default=[], metavar="FILE[:STRENGTH]",
        help="add a LoRA, by default with strength 1; several are given one by one",
    )  # fmt: skip


def _add_video_output(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("output")
    group.add_argument(
        "-o", "--output", metavar="PATH",
        help=".mp4, .webm, .gif, .webp, .png, .jpg, or a folder/ of pictures (default: in outputs/). "
        "Several results are called NAME-0, NAME-1, ..",
    )  # fmt: skip
    _add_quality(group)


def _add_quality(group) -> None:
    group.add_argument("--quality", type=whole, default=90, metavar="N", help="0 to 100 (default: 90)")
    group.add_argument("--tile", type=whole, metavar="N", help="decode in tiles of N x N latent cells, to save memory")


def _add_resume(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--resume", action="store_true",
        help="long clips: keep complete windows in OUTPUT.unfinished.safetensors, and go on from it if it is there",
    )  # fmt: skip


def _add_memory(group) -> None:
    group.add_argument(
        "--memory", type=_bytes, metavar="SIZE", help="of the device to use, as 12GB (default: what is free)"
    )
    group.add_argument(
        "--cache", choices=tuple(CACHES), default="auto",
        help="keys and values in full or in 8 bit (default: 8 bit if nothing else fits)",
    )  # fmt: skip
    group.add_argument(
        "--offload", choices=tuple(OFFLOADS), default="auto",
        help="keep weights, or weights and settled keys and values, in main memory (default: if nothing else fits)",
    )  # fmt: skip


def _add_json(command: argparse.ArgumentParser, text: str = "print JSON") -> None:
    command.add_argument("--json", action="store_true", help=text)


def _positive(text: str) -> int:
    value = whole(text)
    if not 1 <= value <= 10**9:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 to {10**9}")
    return value


def _margins(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[0-9]{1,5}(,[0-9]{1,5}){3}", text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not LEFT,TOP,RIGHT,BOTTOM in pixels, such as 0,0,32,0")
    return tuple(map(int, text.split(",")))


def _frame_range(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"[0-9]{1,7}-[0-9]{1,7}", text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not FIRST-LAST, such as 9-20")
    first, last = map(int, text.split("-"))
    return first, last


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([MGT])(i?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a size such as 12GB or 11.5GiB")
    base, power = 1024 if match[3] else 1000, "MGT".index(match[2].upper()) + 2
    return int(float(match[1]) * base**power)


def _lora(text: str) -> tuple[str, float]:
    """A file and its strength. The colon of a Windows drive belongs to the file."""
    path, colon, number = text.rpartition(":")
    if not colon or os.path.exists(text):
        return text, 1.0
    try:
        strength = float(number)
    except ValueError:
        if os.path.isfile(path):
            raise argparse.ArgumentTypeError(f"{number[:40]!r} is not a strength such as 0.8") from None
        return text, 1.0
    if not math.isfinite(strength):
        raise argparse.ArgumentTypeError(f"{number[:40]!r} is not a strength; give a finite number, such as 0.8")
    return path, strength


def _rate(text: str) -> Fraction:
    # Digits are counted first: a Fraction of 1e999999999 takes all memory.
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{0,9})?(/[0-9]{1,9})?", text) or ("." in text and "/" in text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a rate such as 16, 23.976 or 30000/1001")
    if not text.strip("0./") or ("/" in text and not text.partition("/")[2].strip("0")):
        raise argparse.ArgumentTypeError(f"{text}: a rate must be above 0")
    return Fraction(text)
