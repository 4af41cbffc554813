"""Memory of a GPU in an SFT step of 8 of them: jaxpost's compiled step against TRL's recipe, without a GPU.

    python tools/bench/memory.py --model FOLDER [--rows 2] [--length 4096] [--topology h100:8]

FOLDER holds the config.json of the model, all of which is trained. jaxpost: what `jaxpost plan` reads from the
compiler's memory analysis, parameters and moments in float32. TRL: accelerate_configs/zero3.yaml of its package, ZeRO-3
over 8 processes in bfloat16, with gradient checkpointing. Its states are exact: parameters and gradients in bfloat16,
parameters and two moments in float32, 16 bytes a parameter, an eighth of them on each GPU. The rest is transformers'
own model and loss on fake tensors, followed by torch's MemTracker: the most that is alive at once beside the
parameters, each gradient given away as soon as it is there. What a layer is gathered into, and TRL's metrics of the
logits, are not counted. Needs the parity extra and, for a topology of GPUs, what `jaxpost plan` asks for.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import store

STATE_BYTES = 16  # of a parameter
PROCESSES = 8


def trl_activations(args: argparse.Namespace) -> tuple[float, int]:
    """Bytes beside the parameters at the peak of a forward and backward pass, and the number of parameters."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(args.model)
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            ids = torch.zeros(args.rows, args.length, dtype=torch.long)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
        count = sum(parameter.numel() for parameter in model.parameters())
    return peak["Total"] - 2 * count, count


def jaxpost_bytes(args: argparse.Namespace) -> dict[str, float]:
    """Of a device, by what they are for."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        flags = {"model_name_or_path": args.model, "topology": args.topology, "max_length": args.length}
        flags |= {"per_device_train_batch_size": args.rows, "remat_policy": args.remat_policy, "plan_file": file}
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        subprocess.run([sys.executable, "-m", "jaxpost", "plan", "sft", *words], check=True)
        return json.loads(file.read_text())["memory_bytes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with the config.json of a model")
    parser.add_argument("--rows", type=int, default=2, help="of a device")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--topology", default="h100:8")
    parser.add_argument("--remat_policy", default="full")
    parser.add_argument("--output", help="write the figures to this .json")
    args = parser.parse_args()
    ours = jaxpost_bytes(args)
    activations, count = trl_activations(args)
    theirs = STATE_BYTES * count / PROCESSES + activations
    total = sum(ours.values())
    what = f"Memory of a GPU, SFT of {Path(args.model).name}, {args.rows} x {args.length} tokens each, 8 GPUs"
    figure = f"jaxpost {total / 1e9:.1f} GB, TRL with ZeRO-3 {theirs / 1e9:.1f} GB: {1 - total / theirs:.0%} less"
    found = {"jaxpost": ours, "trl": {"activations": activations, "total": theirs}}
    store(args.output, what, figure, {**found, "ratios": {"trl": theirs / total}})


if __name__ == "__main__":
    main()
