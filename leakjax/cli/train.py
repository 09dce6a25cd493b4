"""`leakjax train`."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from leakjax.cli.options import (
    ActivationName,
    Dataset,
    DefenseSpec,
    Init,
    Json,
    LossName,
    Name,
    Out,
    Range,
    Seed,
    Shape,
    Weights,
    integers,
)
from leakjax.cli.session import progress, session, writable
from leakjax.cli.stdout import answer
from leakjax.errors import InputError, unknown_name
from leakjax.files.whole import write_text


def train(
    model: Name = "cnn6",
    activation: ActivationName = None,
    dataset: Dataset = "samples",
    limit: Annotated[int | None, typer.Option("--limit", help="At most so many images of each split.")] = None,
    epochs: Annotated[int, typer.Option("--epochs", help="How often all examples are seen.")] = 5,
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="B", help="Examples of one client in a step.")
    ] = 32,
    clients: Annotated[int, typer.Option("--clients", help="Whose gradients one step averages.")] = 1,
    optimizer: Annotated[str, typer.Option("--optimizer", metavar="adam|sgd", help="Of Optax.")] = "adam",
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Of the optimizer.")] = 1e-3,
    clip: Annotated[float | None, typer.Option("--clip", help="Clip each client's gradient to this norm.")] = None,
    noise: Annotated[
        float | None, typer.Option("--noise", help="Standard deviation of Gaussian noise on each client's gradient.")
    ] = None,
    defense: DefenseSpec = None,
    keep: Annotated[
        str | None, typer.Option("--keep", metavar="E[,F..]", help="Epochs whose weights are written; default: all.")
    ] = None,
    loss: LossName = None,
    input_shape: Shape = None,
    input_range: Range = None,
    init: Init = None,
    weights: Weights = None,
    seed: Seed = 0,
    dtype: Annotated[str, typer.Option("--dtype", metavar="float64|float32")] = "float32",
    out: Out = Path("leakjax-out"),
    json_output: Json = False,
) -> None:
    """Train a model; writes weights-EPOCH.npz, which --weights of the other commands reads, and training.json."""
    with session() as console:
        import optax

        from leakjax.captures.weights import write_weights
        from leakjax.cli.setup import Setup
        from leakjax.client.defenses import build_defense
        from leakjax.client.training import loop as training

        optimizers = {"adam": optax.adam, "sgd": optax.sgd}
        if optimizer not in optimizers:
            raise unknown_name("optimizer", optimizer, optimizers)
        for option, value in (("--learning-rate", learning_rate), ("--clip", clip), ("--noise", noise)):
            if value is not None and not 0 < value <= 1e15:
                raise InputError(f"{option}: expected a positive number, got {value}")
        if defense is not None and not (clip is None and noise is None):
            raise InputError("--defense: leave out --clip and --noise; it names clipping and noise itself")
        if limit is not None and limit < 1:
            raise InputError(f"--limit: expected a positive number of images, got {limit}")
        told = None if defense is None else build_defense(defense).spec
        directory = writable(out)
        began = time.perf_counter()
        setup = Setup.load(model, activation, init, seed, loss, input_shape, input_range, weights)
        data, test = setup.train_and_test(dataset, limit)
        parts = [] if clip is None else [optax.clip_by_global_norm(clip)]
        parts += [] if noise is None else [optax.add_noise(noise**2, 0.0, seed)]
        with progress(console) as tell:
            result = training.train(
                setup.model,
                data,
                test=test,
                epochs=epochs,
                batch_size=batch_size,
                clients=clients,
                optimizer=optimizers[optimizer](learning_rate),
                loss=setup.loss,
                defense=optax.chain(*parts) if parts else told,
                keep=None if keep is None else integers("--keep", keep),
                input_range=setup.input_range,
                seed=seed,
                dtype=dtype,
                progress=tell,
            )
        files = {epoch: f"weights-{epoch}.npz" for epoch in result.kept}
        for epoch, file in files.items():
            write_weights(result.at(epoch), directory / file)
        summary = {
            "model": model,
            "activation": setup.activation,
            "dataset": dataset,
            "train_examples": len(data.labels),
            "test_examples": len(test.labels),
            "epochs": epochs,
            "batch_size": batch_size,
            "clients": clients,
            "optimizer": optimizer,
            "learning_rate": learning_rate,
            "clip": clip,
            "noise": noise,
            "defense": told,
            "loss": setup.loss,
            "input_range": list(setup.input_range),
            "seed": seed,
            "dtype": dtype,
            "train_loss": result.loss.tolist(),
            "test_accuracy": result.accuracy.tolist(),
            "weights": {str(epoch): file for epoch, file in files.items()},
            "seconds": time.perf_counter() - began,
        }
        write_text(directory / "training.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
        if json_output:
            answer(json.dumps(summary, allow_nan=False))
        else:
            for epoch, accuracy in enumerate(result.accuracy):
                shown = f", training loss {result.loss[epoch - 1]:.4g}" if epoch else ""
                console.print(f"epoch {epoch}: test accuracy {100 * accuracy:.1f} %{shown}", highlight=False)
            console.print(f"wrote {directory}/training.json, {', '.join(files.values())}", highlight=False)
