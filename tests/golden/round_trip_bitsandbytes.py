"""The round trip through the real libraries: does transformers load what we write?

Run it where transformers and bitsandbytes are installed (Python 3.11, CPU build of torch); it calls
this project with another Python. With a GGUF file of SmolLM2 it goes through that model, too.

    TORCHDYNAMO_DISABLE=1 python tests/golden/round_trip_bitsandbytes.py --ours=.venv/bin/python \\
        --gguf=SmolLM2-135M-Instruct.Q4_1.gguf

It ends with an error unless, for each model, also for one of which some layers are in 16 bits,

* their 4-bit folder, read and written by us, directly or by way of our own format, has the same
  bytes in every tensor, and the logits that transformers computes from it are equal;
* our 4-bit folder, made from the 16- or 32-bit model, has the same codes as theirs, and logits that
  differ from theirs by less than a thousandth of the largest (the mean of the scales is summed in
  another order, so some scales differ in the last bit). Not for the one with layers in 16 bits.
"""

import argparse
import json
import os
import pathlib
import subprocess
import tempfile

import torch
import transformers
from safetensors import safe_open

ROOT = pathlib.Path(__file__).parents[2]
NF4 = transformers.BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
)
DYNAMIC = transformers.BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    llm_int8_skip_modules=["lm_head", "model.layers.1.mlp.down_proj", "model.layers.2.self_attn"],
)


def quantize(ours: str, model: pathlib.Path, out: pathlib.Path, *flags: str) -> pathlib.Path:
    """Calls scripts/quantize.py."""
    command = [ours, "scripts/quantize.py", f"--model={model}", f"--out={out}", *flags]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
    return out


def tensors(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}
    return found


def logits(folder: pathlib.Path) -> torch.Tensor:
    """What transformers computes from a folder for the text of loading.json.

    In training mode, which has no dropout here: bitsandbytes then decodes weights and multiplies in
    float32. In evaluation it may take a fused CPU kernel in bfloat16, whose rounding is larger than
    what is looked for. Every tensor gets memory of its own: mapped from a file it may lie anywhere,
    and the order in which a product is summed depends on that.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").train()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    ids = json.loads(pathlib.Path(__file__).with_name("loading.json").read_text())["ids"]
    with torch.no_grad():
        return model(torch.tensor([ids]) % model.config.vocab_size).logits.float()


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same to the bit."""
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check_theirs(
    name: str,
    ours: str,
    dense: pathlib.Path,
    folder: pathlib.Path,
    quantization: transformers.BitsAndBytesConfig,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Their folder of the model in `dense`, by way of ours; its tensors and logits."""
    theirs = folder / "theirs"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        dense, device_map="cpu", quantization_config=quantization
    )
    model.save_pretrained(theirs, max_shard_size="50MB")
    expected, expected_logits = tensors(theirs), logits(theirs)
    direct = quantize(ours, theirs, folder / "direct", "--format=bnb")
    stacked = quantize(ours, theirs, folder / "stacked")
    back = quantize(ours, stacked, folder / "back", "--format=bnb")
    for way, out in (("directly", direct), ("by our own format", back)):
        found = tensors(out)
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        wrong = [key for key in expected if not same_bytes(found[key], expected[key])]
        assert not wrong, wrong
        assert torch.equal(logits(out), expected_logits)
        print(f"{name}: theirs {way}: {len(expected)} tensors the same, logits equal")
    return expected, expected_logits


def check(name: str, ours: str, dense: pathlib.Path, folder: pathlib.Path) -> None:
    """Both directions for the model in `dense`; folders are made in `folder`."""
    expected, expected_logits = check_theirs(name, ours, dense, folder, NF4)
    made = quantize(ours, dense, folder / "made", "--format=bnb")
    found = tensors(made)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    codes = [k for k in expected if k.endswith("_proj.weight")]
    other = [k for k in codes if not same_bytes(found[k], expected[k])]
    assert not other, other
    same = sum(same_bytes(found[key], expected[key]) for key in expected)
    error = (logits(made) - expected_logits).abs().max().item()
    scale = expected_logits.abs().max().item()
    print(
        f"{name}: ours from the dense model: codes of {len(codes)} weights the same, {same} of "
        f"{len(expected)} tensors the same; logits differ by {error:.1e} of at most {scale:.1f}"
    )
    assert error < 1e-3 * scale, error


def main() -> None:
    """Goes through the models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", required=True, help="a Python that has this project's packages")
    parser.add_argument("--gguf", type=pathlib.Path, help="SmolLM2 as a GGUF file")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        (folder / "tiny").mkdir()
        transformers.LlamaForCausalLM(config).save_pretrained(folder / "tiny" / "dense")
        dense = folder / "tiny" / "dense"
        check_theirs("tiny, dynamic", args.ours, dense, folder / "dynamic", DYNAMIC)
        check("tiny", args.ours, dense, folder / "tiny")
        if args.gguf:
            smol = folder / "smol"
            model = transformers.AutoModelForCausalLM.from_pretrained(
                args.gguf.parent, gguf_file=args.gguf.name, dtype=torch.float32
            )
            # Reading a GGUF marks the model as quantized, and saving would refuse it.
            model.hf_quantizer = None
            model.config.__dict__.pop("quantization_config", None)
            model.save_pretrained(smol / "dense")
            check("SmolLM2-135M", args.ours, smol / "dense", smol)
            gguf = quantize(args.ours, args.gguf, smol / "gguf", "--format=bnb")
            expected = logits(smol / "theirs")
            error = (logits(gguf) - expected).abs().max().item()
            tokenizer = transformers.AutoTokenizer.from_pretrained(gguf)
            print(
                f"SmolLM2-135M: ours from the GGUF file: logits differ by {error:.1e}; the "
                f"tokenizer loads: {tokenizer.tokenize('The capital of France')}"
            )
            assert error < 1e-3 * expected.abs().max().item(), error


if __name__ == "__main__":
    main()
