"""The guard in clients of Flower and NVFlare: only what is plainly allowed is sent, and nothing else is said.

Each half is skipped where its extra is not installed; `make test-all` installs both.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import leakjax
from leakjax import InputError
from leakjax.guard import guard, loss_of
from leakjax.guard.gate import refusal
from leakjax.guard.scoring import LIMIT, Score

ROOT = Path(__file__).resolve().parents[1]
SECRET = 0.123456789

ALLOWED = Score(
    leaked_dimensions=jnp.asarray(3.0),
    leaked_fraction=jnp.asarray(0.25),
    predicted_psnr=jnp.asarray(12.0),
    worst_leaked_fraction=jnp.asarray(0.375),
    worst_psnr=jnp.asarray(13.0),
    allowed=jnp.asarray(True),
    reason=jnp.asarray(0),
)
BLOCKED = ALLOWED._replace(allowed=jnp.asarray(False), reason=jnp.asarray(LIMIT))


def raises(*_):
    raise ValueError(f"images lie in {SECRET} to 255")


class Outspoken:
    """An answer whose fields raise."""

    allowed = property(raises)


# What a score may return, and a part of the reason why that blocks.
REFUSED = {
    "not allowed": (BLOCKED, "more leaks than the limits allow: leaked fraction 0.25, worst image 0.375"),
    "NaN": (ALLOWED._replace(worst_leaked_fraction=jnp.asarray(jnp.nan)), "not finite: worst_leaked_fraction"),
    "infinite": (ALLOWED._replace(predicted_psnr=np.float32(np.inf)), "not finite: predicted_psnr"),
    "one": (ALLOWED._replace(allowed=1), "does not say that it is allowed"),
    "text": (ALLOWED._replace(allowed="True"), "does not say that it is allowed"),
    "several": (ALLOWED._replace(allowed=np.array([True, True])), "does not say that it is allowed"),
    "one of several": (ALLOWED._replace(allowed=np.array([True])), "does not say that it is allowed"),
    "a reason": (ALLOWED._replace(reason=jnp.asarray(LIMIT)), "more leaks"),
    "a part of a reason": (ALLOWED._replace(reason=0.4), "does not say that it is allowed"),
    "less than none": (ALLOWED._replace(leaked_fraction=-5.0), "no share of what there is: leaked_fraction"),
    "more than all": (ALLOWED._replace(worst_leaked_fraction=2.0), "no share of what there is: worst_leaked"),
    "no number": (ALLOWED._replace(leaked_fraction=None), "raised TypeError"),
    "numbers": (ALLOWED._replace(leaked_fraction=np.ones(2)), "raised ValueError"),
    "True": (True, "no Score of leakjax.guard but a bool"),
    "None": (None, "a NoneType"),
    "a tuple": (tuple(ALLOWED), "a tuple"),
    "a likeness": (Outspoken(), "an Outspoken"),
}
CASES = pytest.mark.parametrize(("found", "words"), REFUSED.values(), ids=REFUSED)


@CASES
def test_the_gate_refuses_all_but_a_plain_yes(found, words):
    assert words.removeprefix("an ") in refusal(lambda: found)


def test_the_gate_opens_and_does_not_quote_exceptions(caplog):
    assert refusal(lambda: ALLOWED) is None
    assert refusal(lambda: ALLOWED._replace(allowed=np.True_, reason=0)) is None
    with caplog.at_level("INFO"):
        assert refusal(raises) == "the score raised ValueError"
    assert str(SECRET) not in caplog.text
    with caplog.at_level("DEBUG"):
        refusal(raises)
    assert str(SECRET) in caplog.text


def test_a_traced_score_is_refused():
    """Under `jit` nobody knows what it says."""

    @jax.jit
    def inside(fraction):
        reasons.append(refusal(lambda: ALLOWED._replace(leaked_fraction=fraction)))
        return fraction

    reasons = []
    inside(0.5)
    assert reasons == ["the score raised TracerArrayConversionError"]


class Net(nnx.Module):
    """A strided convolution, a mean over positions and a dense head: few numbers where it has few channels."""

    def __init__(self, channels):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, channels, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(channels, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.tanh(self.conv(x)).mean((1, 2)))


class Flower:
    """Flower's types, a message and an app that counts its calls."""

    def __init__(self):
        self.app = pytest.importorskip("flwr.app", reason="needs the extra flower: make federated")
        self.mod = pytest.importorskip("leakjax.interop.flower").guard_mod
        self.calls = []

    def record(self, arrays):
        return self.app.ArrayRecord({name: self.app.Array(np.asarray(a)) for name, a in arrays.items()})

    def message(self, kind="train", **records):
        records = records or {"arrays": self.record({"w": np.arange(3.0)})}
        metadata = self.app.Metadata(
            run_id=1,
            message_id="a",
            src_node_id=1,
            dst_node_id=7,
            reply_to_message_id="",
            group_id="",
            created_at=time.time(),
            ttl=60.0,
            message_type=kind,
        )
        return self.app.Message(content=self.app.RecordDict(records), metadata=metadata)

    def context(self):
        state = self.app.RecordDict()
        return self.app.Context(run_id=1, node_id=7, node_config={}, state=state, run_config={})

    def train(self, message, context):
        self.calls.append((message, context))
        return self.app.Message(self.app.RecordDict({"arrays": self.record({"w": np.ones(3)})}), reply_to=message)

    def blocked(self, reply, message, words):
        """The reply is an error that answers the message, says so, and has neither content nor data."""
        from flwr.common.constant import ErrorCode

        assert not self.calls
        assert reply.has_error()
        assert not reply.has_content()
        assert reply.error.code == ErrorCode.MOD_FAILED_PRECONDITION
        assert words in reply.error.reason
        assert str(SECRET) not in reply.error.reason
        assert reply.metadata.reply_to_message_id == message.metadata.message_id
        assert reply.metadata.message_type == message.metadata.message_type
        return True


@pytest.fixture
def flower():
    return Flower()


@pytest.mark.parametrize("kind", ["train", "train.local", "query", "evaluate"])
def test_flower_what_is_allowed_passes_unchanged(flower, kind):
    message, context, asked = flower.message(kind), flower.context(), []

    def score(arrays, given):
        asked.append((arrays["w"].numpy().tolist(), given))
        assert not flower.calls  # before training
        return ALLOWED

    reply = flower.mod(score, everything=True)(message, context, flower.train)
    assert asked == [([0.0, 1.0, 2.0], context)]
    ((passed, given),) = flower.calls
    assert passed is message
    assert given is context
    assert reply.content["arrays"]["w"].numpy().tolist() == [1.0, 1.0, 1.0]


@CASES
def test_flower_all_but_a_plain_yes_is_blocked(flower, found, words):
    message = flower.message()
    reply = flower.mod(lambda arrays, context: found)(message, flower.context(), flower.train)
    assert flower.blocked(reply, message, words.removeprefix("an "))


@pytest.mark.parametrize("kind", ["train", "train.local", "reconnect", "get_parameters"])
def test_flower_a_score_that_raises_blocks_what_may_train(flower, kind):
    message = flower.message(kind)
    reply = flower.mod(raises)(message, flower.context(), flower.train)
    assert flower.blocked(reply, message, "blocked by guard_mod: the score raised ValueError")


@pytest.mark.parametrize("kind", ["evaluate", "evaluate.central", "query", "query.labels"])
def test_flower_evaluation_and_queries_pass_unless_everything_is_scored(flower, kind):
    message = flower.message(kind)
    assert flower.blocked(flower.mod(raises, everything=True)(message, flower.context(), flower.train), message, "rais")
    assert flower.mod(raises)(message, flower.context(), flower.train).has_content()
    assert len(flower.calls) == 1


@pytest.mark.parametrize("count", [0, 2])
def test_flower_a_message_of_another_form_is_blocked(flower, count):
    records = {f"arrays{i}": flower.record({"w": np.ones(2)}) for i in range(count)}
    message = flower.message(config=flower.app.ConfigRecord({"lr": 0.1}), **records)
    reply = flower.mod(lambda arrays, context: ALLOWED)(message, flower.context(), flower.train)
    assert flower.blocked(reply, message, f"holds {count} array records")


def test_flower_a_message_without_content_is_blocked(flower):
    message = flower.app.Message(flower.app.Error(0, "lost"), reply_to=flower.message())
    reply = flower.mod(lambda arrays, context: ALLOWED)(message, flower.context(), flower.train)
    assert flower.blocked(reply, message, "holds 0 array records")


@pytest.mark.parametrize("score", [None, ALLOWED, "allowed"])
def test_flower_a_score_is_a_function(flower, score):
    with pytest.raises(InputError, match="score must be a function"):
        flower.mod(score)


@pytest.mark.parametrize(("channels", "limit", "passes"), [(2, 0.6, True), (2, 0.3, False), (32, 0.6, False)])
def test_flower_with_a_guard_in_a_client_app(flower, channels, limit, passes):
    """86 numbers are .448 of 192 pixels. The weights scored are those that came, and not the client's own."""
    from flwr.clientapp import ClientApp

    net = Net(channels)
    watch, params = guard(loss_of(net), max_leaked_fraction=limit), leakjax.read_model(net).params
    batch = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype(np.float32), np.array([3, 1])

    def score(arrays, context):
        return watch.score({name: a.numpy() for name, a in arrays.items()}, *batch)

    app = ClientApp(mods=[flower.mod(score)])
    app.train()(flower.train)
    per_batch = 2 * 86 / 384 if channels == 2 else 1.0
    message = flower.message(arrays=flower.record(params))
    reply = app(message, flower.context())
    assert reply.has_content() == passes == bool(flower.calls)
    if not passes:
        assert flower.blocked(reply, message, f"worst image {per_batch:.3g}")
    flower.calls.clear()
    broken = flower.message(arrays=flower.record({n: np.full_like(a, np.nan) for n, a in params.items()}))
    assert flower.blocked(app(broken, flower.context()), broken, "the update or its derivative is not finite")


class NVFlare:
    """NVFlare's types, the filter and a result."""

    def __init__(self):
        for name in ("dxo", "filter", "fl_constant", "fl_context", "shareable"):
            reason = "needs the extra nvflare: make federated"
            setattr(self, name, pytest.importorskip(f"nvflare.apis.{name}", reason=reason))
        self.guarded = pytest.importorskip("leakjax.interop.nvflare").GuardFilter

    def result(self):
        return self.dxo.DXO(self.dxo.DataKind.WEIGHT_DIFF, {"w": np.full(3, SECRET)}).to_shareable()

    def blocked(self, guarded, shareable, words):
        with pytest.raises(self.filter.ContentBlockedException, match="blocked by GuardFilter") as caught:
            guarded.process(shareable, self.fl_context.FLContext())
        assert words in str(caught.value)
        assert str(SECRET) not in str(caught.value)
        return True


@pytest.fixture
def nvflare():
    return NVFlare()


def test_nvflare_what_is_allowed_passes_unchanged(nvflare):
    result, context, asked = nvflare.result(), nvflare.fl_context.FLContext(), []

    def score(dxo, fl_ctx):
        asked.append((dxo.data["w"].tolist(), fl_ctx))
        return ALLOWED

    assert nvflare.guarded(score).process(result, context) is result
    assert asked == [([SECRET] * 3, context)]
    assert nvflare.dxo.from_shareable(result).data["w"].tolist() == [SECRET] * 3


@CASES
def test_nvflare_all_but_a_plain_yes_is_blocked(nvflare, found, words):
    assert nvflare.blocked(nvflare.guarded(lambda *_: found), nvflare.result(), words.removeprefix("an "))


def test_nvflare_exceptions_and_what_is_no_dxo_are_blocked(nvflare):
    assert nvflare.blocked(nvflare.guarded(raises), nvflare.result(), "the score raised ValueError")
    loose = nvflare.shareable.Shareable()
    loose["weights"] = np.full(3, SECRET)  # which NVFlare's own DXO filters let pass
    assert nvflare.blocked(nvflare.guarded(lambda *_: ALLOWED), loose, "holds no DXO")


def test_nvflare_an_error_leaves_without_its_content(nvflare):
    result = nvflare.result()
    result.set_return_code(nvflare.fl_constant.ReturnCode.EXECUTION_EXCEPTION)
    sent = nvflare.guarded(lambda *_: ALLOWED).process(result, nvflare.fl_context.FLContext())
    assert sent.get_return_code() == nvflare.fl_constant.ReturnCode.EXECUTION_EXCEPTION
    assert "DXO" not in sent
    assert str(SECRET) not in str(sent)


def test_nvflare_a_score_is_a_function_or_names_one(nvflare):
    assert nvflare.blocked(nvflare.guarded(f"{__name__}:raises"), nvflare.result(), "raised ValueError")
    for score in (None, 1, "no_such_module:score", f"{__name__}:SECRET"):
        with pytest.raises(InputError, match="score"):
            nvflare.guarded(score)


def test_nvflare_clients_apply_it_and_jobs_write_it_down(nvflare, tmp_path):
    """By NVFlare's own chain of filters, and in what its own API writes, which the page shows."""
    from nvflare.apis.utils.task_utils import apply_filters
    from nvflare.job_config.api import FedJob
    from nvflare.job_config.defs import FilterType

    key, context = nvflare.fl_constant.FilterKey, nvflare.fl_context.FLContext()
    for score, blocks_it in ((raises, True), (lambda *_: ALLOWED, False)):
        chains, result = {f"train{key.DELIMITER}{key.OUT}": [nvflare.guarded(score)]}, nvflare.result()
        if blocks_it:
            with pytest.raises(nvflare.filter.ContentBlockedException):
                apply_filters("task_result_filters", result, context, chains, "train", key.OUT)
        else:
            assert apply_filters("task_result_filters", result, context, chains, "train", key.OUT) is result
    job, path = FedJob(name="job"), f"{__name__}:raises"
    job.to(nvflare.guarded(path), "site", tasks=["train"], filter_type=FilterType.TASK_RESULT)
    job.export_job(str(tmp_path))
    written = json.loads((tmp_path / "job/app_site/config/config_fed_client.json").read_text())["task_result_filters"]
    (shown,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs/flower.md").read_text(), re.DOTALL)
    assert written == json.loads(shown.replace("watching:score", path))["task_result_filters"]


@pytest.mark.parametrize(("channels", "passes"), [(2, True), (32, False)])
def test_nvflare_with_a_guard(nvflare, channels, passes):
    net = Net(channels)
    watch, params = guard(loss_of(net), max_leaked_fraction=0.6), leakjax.read_model(net).params
    batch = np.random.default_rng(0).uniform(size=(1, 8, 8, 3)).astype(np.float32), np.array([3])
    guarded, result = nvflare.guarded(lambda dxo, fl_ctx: watch.score(params, *batch)), nvflare.result()
    if passes:
        assert guarded.process(result, nvflare.fl_context.FLContext()) is result
    else:
        assert nvflare.blocked(guarded, result, "leaked fraction 1, worst image 1")


def blocks():
    """The Python blocks of the page, with their titles."""
    found = re.findall(r"```python([^\n]*)\n(.*?)```", (ROOT / "docs/flower.md").read_text(), re.DOTALL)
    return [(title.strip(), textwrap.dedent(code)) for title, code in found]


def test_the_page_runs(tmp_path):
    for name in ("flwr", "nvflare"):
        if importlib.util.find_spec(name) is None:
            pytest.skip("needs the extras flower and nvflare: make federated")
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps([("flower.md", *block) for block in blocks()]))
    run = [sys.executable, str(ROOT / "tests/run_pages.py"), str(plan)]
    importable = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, env=importable, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ran ") == len(blocks()) == 3
