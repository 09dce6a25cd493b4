"""`leakjax train`."""

import dataclasses
import json
import time
from typing import Annotated, Any

import typer

from leakjax.cli.options import Dataset, DefenseSpec, ModelOptions, OutputOptions, integers
from leakjax.cli.progress import progress
from leakjax.cli.session import session, writable
from leakjax.cli.stdout import answer
from leakjax.errors import InputError, unknown_name
from leakjax.files.whole import write_text


def _option(name: str, metavar: str | None, help: str) -> Any:
    return typer.Option(name, metavar=metavar, help=help, rich_help_panel="Training")


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """How a model is trained."""

    limit: Annotated[int | None, _option("--limit", None, "At most so many images of each split.")] = None
    epochs: Annotated[int, _option("--epochs", None, "How often all examples are seen.")] = 5
    batch_size: Annotated[int, _option("--batch-size", "B", "Examples of one client in a step.")] = 32
    clients: Annotated[int, _option("--clients", None, "Whose gradients one step averages.")] = 1
    optimizer: Annotated[str, _option("--optimizer", "adam|sgd", "Of Optax.")] = "adam"
    learning_rate: Annotated[float, _option("--learning-rate", None, "Of the optimizer.")] = 1e-3
    clip: Annotated[float | None, _option("--clip", None, "Clip each client's gradient to this norm.")] = None
    noise: Annotated[
        float | None, _option("--noise", None, "Standard deviation of Gaussian noise on each client's gradient.")
    ] = None
    defense: DefenseSpec = None
    keep: Annotated[str | None, _option("--keep", "E[,F..]", "Epochs whose weights are written; default: all.")] = None
    dtype: Annotated[str, _option("--dtype", "float64|float32", "Precision of the training.")] = "float32"


def train(model: ModelOptions, training: TrainingOptions, output: OutputOptions, dataset: Dataset = "samples") -> None:
    """Train a model; writes weights-EPOCH.npz, which --weights of the other commands reads, and training.json."""
    with session() as console:
        import optax

        from leakjax.captures.weights import write_weights
        from leakjax.cli.setup import Setup
        from leakjax.client.defenses import build_defense
        from leakjax.client.training import loop
        from leakjax.models.losses import loss_name

        optimizers = {"adam": optax.adam, "sgd": optax.sgd}
        if training.optimizer not in optimizers:
            raise unknown_name("optimizer", training.optimizer, optimizers)
        _check(training)
        told = None if training.defense is None else build_defense(training.defense).spec
        directory = writable(output.out)
        began = time.perf_counter()
        setup = Setup.load(model)
        data, test = setup.train_and_test(dataset, training.limit)
        parts = [] if training.clip is None else [optax.clip_by_global_norm(training.clip)]
        parts += [] if training.noise is None else [optax.add_noise(training.noise**2, 0.0, model.seed)]
        with progress(console) as tell:
            result = loop.train(
                setup.model,
                data,
                test=test,
                epochs=training.epochs,
                batch_size=training.batch_size,
                clients=training.clients,
                optimizer=optimizers[training.optimizer](training.learning_rate),
                loss=setup.loss,
                defense=optax.chain(*parts) if parts else told,
                keep=None if training.keep is None else integers("--keep", training.keep),
                input_range=setup.input_range,
                seed=model.seed,
                dtype=training.dtype,
                progress=tell,
            )
        files = {epoch: f"weights-{epoch}.npz" for epoch in result.kept}
        for epoch, file in files.items():
            write_weights(result.at(epoch), directory / file)
        own = ("epochs", "batch_size", "clients", "optimizer", "learning_rate", "clip", "noise")
        summary = {
            "model": model.name,
            "activation": setup.activation,
            "dataset": dataset,
            "train_examples": len(data.labels),
            "test_examples": len(test.labels),
            **{name: getattr(training, name) for name in own},
            "defense": told,
            "loss": loss_name(setup.loss),
            "input_range": list(setup.input_range),
            "seed": model.seed,
            "dtype": training.dtype,
            "train_loss": result.loss.tolist(),
            "test_accuracy": result.accuracy.tolist(),
            "weights": {str(epoch): file for epoch, file in files.items()},
            "seconds": time.perf_counter() - began,
        }
        write_text(directory / "training.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
        if output.json_output:
            answer(json.dumps(summary, allow_nan=False))
        else:
            for epoch, accuracy in enumerate(result.accuracy):
                shown = f", training loss {result.loss[epoch - 1]:.4g}" if epoch else ""
                console.print(f"epoch {epoch}: test accuracy {100 * accuracy:.1f} %{shown}", highlight=False)
            console.print(f"wrote {directory}/training.json, {', '.join(files.values())}", highlight=False)


def _check(training: TrainingOptions) -> None:
    named = {"--learning-rate": training.learning_rate, "--clip": training.clip, "--noise": training.noise}
    for option, value in named.items():
        if value is not None and not 0 < value <= 1e15:
            raise InputError(f"{option}: expected a positive number, got {value}")
    if training.defense is not None and not (training.clip is None and training.noise is None):
        raise InputError("--defense: leave out --clip and --noise; it names clipping and noise itself")
    if training.limit is not None and training.limit < 1:
        raise InputError(f"--limit: expected a positive number of images, got {training.limit}")
