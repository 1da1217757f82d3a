"""Downstream tasks against plain sums, and training runs that measure them."""

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
import model_factory
import numpy as np
from quantloom import experiments as E
from quantloom import fit as F
from quantloom import formats as Q
from quantloom import quantisation_training as T
from quantloom.experiments import downstream, qat
from quantloom.experiments import token_prediction as ET

SPEC = F.Scaled(3, "int", Q.BFLOAT16, (1, None), "absmax", scaling_match="moments")


def letters(text):
    return [1 + ord(character) % 90 for character in text]


def write(path, questions):
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    return downstream.Task("letters", str(path))


QUESTIONS = [
    {"context": "abc", "choices": ["d", "xyz", "qq"], "answer": 1},
    {"context": "", "choices": ["no", "yes"], "answer": 0},
    {"context": "a longer question", "choices": [" a", " much longer answer"], "answer": 1},
]


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_answers_against_plain_sums(tmp_path, batch_size):
    model = model_factory.build(model_factory.llama())
    task = write(tmp_path / "task.jsonl", QUESTIONS)
    right = per_character = 0
    expected = []
    for question in QUESTIONS:
        scores = []
        for choice in question["choices"]:
            context = [0, *letters(question["context"])]
            ids = context + letters(choice)
            with torch.no_grad():
                logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(logp[place - 1, ids[place]]) for place in range(len(context), len(ids))))
        relative = [score / len(choice) for score, choice in zip(scores, question["choices"])]
        right += int(np.argmax(scores)) == question["answer"]
        per_character += int(np.argmax(relative)) == question["answer"]
        expected.append(scores[question["answer"]])
    model.train()
    found = downstream.evaluate(model, task, letters, batch_size)
    assert model.training
    assert found["questions"] == 3
    assert found["accuracy"] == right / 3 and found["accuracy_per_character"] == per_character / 3
    assert found["log_likelihood"] == pytest.approx(np.mean(expected), rel=1e-4)
    limited = downstream.Task("letters", task.path, 1)
    assert downstream.evaluate(model, limited, letters)["questions"] == 1


def test_ends_of_texts_may_be_joined(tmp_path):
    """A tokenizer may join the last letter of the context with the first of an answer."""

    def pairs(text):
        return [1 + sum(map(ord, text[place : place + 2])) % 90 for place in range(0, len(text), 2)]

    ids, first = downstream._tokens([0], "abc", "d", pairs)
    assert (len(ids), first) == (3, 2)
    with pytest.raises(ValueError, match="gives no token"):
        downstream._tokens([], "", "d", pairs)


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        "[1]",
        '{"context": "a", "choices": ["b"], "answer": 0}',
        '{"context": "a", "choices": ["b", ""], "answer": 0}',
        '{"context": 3, "choices": ["b", "c"], "answer": 0}',
        '{"context": "a", "choices": ["b", "c"], "answer": 2}',
        '{"context": "a", "choices": ["b", "c"], "answer": true}',
        '{"context": "a", "choices": ["b", "c"]}',
    ],
)
def test_bad_files(tmp_path, line):
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps(QUESTIONS[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"line 2: got .*, expected"):
        downstream.load(downstream.Task("bad", str(path)))
    path.write_text("")
    with pytest.raises(ValueError, match="no question"):
        downstream.load(downstream.Task("bad", str(path)))


def test_runs_train_and_measure_tasks(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    model_factory.write_model(folder, model_factory.llama())
    text = tmp_path / "text.u16"
    model_factory.token_ids(400).astype("<u2").tofile(text)
    monkeypatch.setattr(qat.evaluate, "tokenizer", lambda path: letters)
    train = qat.TrainingSettings(
        12, 8, str(text), str(text), log_interval=5, valid_sequences=8, sequence_length=16
    )
    opt = qat.OptimiserSettings(2e-3, qat.LRModifiers(centroids=0.5))
    tasks = (write(tmp_path / "task.jsonl", QUESTIONS),)
    exe = qat.ExecutionSettings("cpu")
    tests = [
        ET.Baseline(),
        qat.QAT(SPEC, "parameter", False),
        qat.QAT(SPEC, "dynamic", True),
        qat.QAT(SPEC, "parameter", False, mode="one-shot"),
    ]
    runs = qat.run_sweep(
        [qat.Run("qat", str(folder), test, train, opt, exe, tasks) for test in tests],
        folder=tmp_path / "runs",
    )
    assert [run.meta.status for run in runs] == ["finished"] * 4, [run.error for run in runs]
    cast = ET.run_sweep(
        [
            ET.Run(
                "cast",
                ET.QuantiseFixed(SPEC),
                str(folder),
                str(text),
                16,
                kl_topk=97,
                batch_size=8,
                sequence_limit=8,
                device="cpu",
            )
        ],
        folder=tmp_path / "runs",
    )[0]
    assert abs(np.mean(runs[0].summary.kl_div)) < 1e-5
    for run in runs[1:]:
        assert run.config.test.fmt_str == str(SPEC)
        log = run.summary.train
        assert log.loss[0] is None and all(loss > 0 for loss in log.loss[1:])
        assert {len(entries) for entries in log.values()} == {3}  # of step 0, 5 and 10
        assert log.valid_kl_div[-1] < log.valid_kl_div[0]
        assert set(log.bits_per_param) == {run.summary.bits_per_param}
        assert np.mean(run.summary.kl_div) < np.mean(cast.summary.kl_div)
        assert len(run.summary.kl_div) == 8
    for run in runs:
        assert run.summary.valid_kl_div == pytest.approx(np.mean(run.summary.kl_div))
        assert run.summary.downstream.letters.questions == 3
    assert runs[0].summary.bits_per_param == 32 and len(runs[0].summary.train.loss) == 1
    again = qat.run_sweep(
        [qat.Run("qat", str(folder), tests[1], train, opt, exe, tasks)], folder=tmp_path / "runs"
    )
    assert again[0].id == runs[1].id
    with pytest.raises(TypeError, match=r"expected qat\.QAT or Baseline"):
        qat.run_sweep([qat.Run("qat", str(folder), ET.QuantiseFixed(SPEC), train, opt)])
    assert E.runs("qat", folder=tmp_path / "runs")[0].config.opt.betas == [0.9, 0.95]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules(schedule):
    factor = qat._schedule(schedule, 10)
    assert factor(0) == 1 and factor(10) == pytest.approx(1 if schedule == "constant" else 0)
    assert factor(5) == pytest.approx(1 if schedule == "constant" else 0.5)


def test_rates_of_kinds():
    model = model_factory.build(model_factory.llama())
    student = model_factory.build(model_factory.llama())
    data = ET.Dataset.load(model, model_factory.token_ids(200), 16, 4, 0)
    T.convert(student, SPEC, "parameter", False)
    before = {
        kind: [value.detach().clone() for _, value in T.get_named_parameters(student, kind)]
        for kind in ("weight", "scale", "centroids", "other")
    }
    opt = qat.OptimiserSettings(1e-2, qat.LRModifiers(weight=0.0, scale=1.0, centroids=0.0, other=1.0))
    qat._fit(student, model, data, 2, opt)
    for kind, changes in {"weight": False, "scale": True, "centroids": False, "other": True}.items():
        values = [value for _, value in T.get_named_parameters(student, kind)]
        assert all(old.equal(new) != changes for old, new in zip(before[kind], values)), kind
        assert all(value.requires_grad for value in values)


def test_training_needs_a_text(tmp_path):
    model = E.RequantisableModel.of(model_factory.build(model_factory.llama()))
    data = ET.Dataset.load(model.model, model_factory.token_ids(200), 16, 4, 0)
    with pytest.raises(ValueError, match="train_text: got None"):
        qat.QAT(SPEC).run(model, data)
