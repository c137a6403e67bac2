"""`edgert warmup`: compile ahead what a chat needs, so that the first one on a machine does not wait."""

from __future__ import annotations

import time

from edgert.cli import output
from edgert.cli.options import Chosen, Json, ModelName, command

_PROMPT_TOKENS = 64  # enough for the kernels that take many rows


@command()
def warmup(model: ModelName = None, json: Json = False, *, chosen: Chosen) -> None:
    """Compile and keep the kernels that chat needs with a model.

    For deployment: run it once after installing or upgrading edgert, as the user and on the machine that will chat.
    The machine code stays in the user's cache folder (XDG_CACHE_HOME, by default ~/.cache), for all models whose
    weights are of the same kinds. Give the options of the chat that is to come. Exits with 0 when a chat can start.
    """
    started = time.perf_counter()
    with output.open_model(model, chosen.runtime) as opened:
        with output.progress("running a prompt") as report:
            n_tokens = max(1, min(_PROMPT_TOKENS, opened.n_context - 1))
            opened.generate([token % opened.config.n_vocab for token in range(n_tokens)], max_tokens=2)
            report("ready", 1.0)
        name = opened.name
    from edgert import machine
    from edgert.quant import jit

    kernels = machine.kernels()
    done = {
        "model": name,
        "seconds": time.perf_counter() - started,
        "compiled": jit.WORK["compiled"],
        "found": jit.WORK["found"],
        "kernels": kernels,
    }
    if json:
        output.write_json(done)
        return
    counts = f"{done['compiled']} kernels compiled, {done['found']} found in the cache"
    output.write(f"{name} is ready after {done['seconds']:.1f} s: {counts}\n")
    output.write(f"{kernels['folder']} holds {kernels['count']}, {output.binary_size(kernels['bytes'])}\n")
