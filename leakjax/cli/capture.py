"""`leakjax capture`."""

import json
from pathlib import Path

from leakjax.cli.options import (
    ActivationName,
    BatchSize,
    Dataset,
    DefenseSpec,
    Dtype,
    ImagesFile,
    Index,
    Init,
    Json,
    LearningRate,
    LocalSteps,
    LossName,
    Mean,
    Name,
    Out,
    Range,
    Seed,
    Shape,
    Std,
    WeightDecay,
    Weights,
    integers,
)
from leakjax.cli.session import session, writable
from leakjax.cli.stdout import answer


def capture(
    model: Name = "cnn6",
    activation: ActivationName = None,
    dataset: Dataset = "samples",
    index: Index = "0",
    images: ImagesFile = None,
    batch_size: BatchSize = 1,
    defense: DefenseSpec = None,
    local_steps: LocalSteps = 1,
    learning_rate: LearningRate = None,
    weight_decay: WeightDecay = None,
    loss: LossName = None,
    input_shape: Shape = None,
    input_range: Range = None,
    input_mean: Mean = None,
    input_std: Std = None,
    init: Init = None,
    weights: Weights = None,
    seed: Seed = 0,
    dtype: Dtype = "float64",
    out: Out = Path("leakjax-out"),
    json_output: Json = False,
) -> None:
    """Write the gradient that a client would send, with the weights, to capture.npz; never the image."""
    with session() as console:
        from leakjax.captures.capture import write_capture
        from leakjax.cli.setup import Sending, Setup

        directory = writable(out)
        told = (loss, input_shape, input_range, weights, input_mean, input_std)
        setup = Setup.load(model, activation, init, seed, *told)
        sending = Sending(
            defense=defense,
            seed=seed,
            local_steps=local_steps,
            learning_rate=learning_rate,
            weight_decay=weight_decay or 0.0,
        )
        observation, _ = setup.observe(dataset, integers("--index", index), images, batch_size, dtype, sending)
        path = directory / "capture.npz"
        write_capture(observation, path)
        if json_output:
            summary = {"capture": str(path), "model": model, "activation": setup.activation, "dtype": dtype}
            answer(json.dumps({**summary, "victims": observation.victims, "examples": observation.examples}))
        else:
            console.print(f"wrote {path}: {observation.victims} gradient(s) of {model}", highlight=False)
