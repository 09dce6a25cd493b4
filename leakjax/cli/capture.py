"""`leakjax capture`."""

import json

from leakjax.cli.options import ClientOptions, DataOptions, Dtype, NormalizedModelOptions, OutputOptions
from leakjax.cli.session import session, writable
from leakjax.cli.stdout import answer


def capture(
    model: NormalizedModelOptions,
    data: DataOptions,
    client: ClientOptions,
    output: OutputOptions,
    dtype: Dtype = "float64",
) -> None:
    """Write the gradient that a client would send, with the weights, to capture.npz; never the image."""
    with session() as console:
        from leakjax.captures.capture import write_capture
        from leakjax.cli.setup import Setup

        directory = writable(output.out)
        setup = Setup.load(model)
        observation, _ = setup.observe(data, client, dtype, model.seed)
        path = directory / "capture.npz"
        write_capture(observation, path)
        if output.json_output:
            summary = {"capture": str(path), "model": model.name, "activation": setup.activation, "dtype": dtype}
            answer(json.dumps({**summary, "victims": observation.victims, "examples": observation.examples}))
        else:
            console.print(f"wrote {path}: {observation.victims} gradient(s) of {model.name}", highlight=False)
