"""Runs in AutoRound's environment: a checkpoint in one of its export formats, rounded to nearest.

python make_autoround.py SOURCE OUT FORMAT BITS sym|asym GROUP_SIZE
"""

import sys

import torch


def main() -> None:
    from auto_round import AutoRound

    source, out, form, bits, sym, size = sys.argv[1:7]
    torch.set_num_threads(1)
    numbers = {"bits": int(bits), "group_size": int(size), "sym": sym == "sym", "act_bits": 16, "data_type": "int"}
    tuner = AutoRound(source, scheme=numbers, iters=0, disable_opt_rtn=True, nsamples=1, seqlen=8)
    tuner.quantize_and_save(out, format=form)


if __name__ == "__main__":  # it starts processes, which import this file
    main()
