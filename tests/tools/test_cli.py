"""The command line: its output, exit codes, imports and start-up time."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers
from cases import pair
from typer.testing import CliRunner

import fastbert
from fastbert import cli, graph_rules, ops
from fastbert.cli import app
from fastbert.commands import benchmark, information, machine
from fastbert.ops import backend, eager

runner = CliRunner(env={"COLUMNS": "80"})


@pytest.fixture(autouse=True)
def _verbosity():
    """Commands change transformers' log level, which is global. Set it back."""
    before = transformers.utils.logging.get_verbosity()
    yield
    transformers.utils.logging.set_verbosity(before)


@pytest.fixture
def model(tmp_path) -> str:
    """The folder of a tiny BertModel without a tokenizer."""
    _, theirs = pair()
    theirs.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def run_python(code: str) -> subprocess.CompletedProcess:
    """Run Python code in a process outside of the repository."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(sys.prefix))


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], *([name, "--help"] for name in ("verify", "bench", "encode", "serve", "info"))],
    ids=str,
)
def test_help_answers_at_once_and_imports_nothing_heavy(arguments):
    code = f"""
import sys
sys.argv = ["fastbert", *{arguments}]
from fastbert.cli import main
try:
    main()
finally:
    assert not {{"torch", "transformers", "triton", "sentence_transformers"}} & sys.modules.keys(), "heavy"
"""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        found = run_python(code)
        seconds.append(time.perf_counter() - start)
        assert found.returncode == 0, found.stderr
    assert min(seconds) < 1


def test_help_shows_examples():
    commands = {command.callback.__name__: command for command in app.registered_commands}
    assert commands.keys() == {"verify", "bench", "encode", "serve", "info"}
    for name in commands:
        shown = " ".join(runner.invoke(app, [name, "--help"]).stdout.split())
        assert f"Examples fastbert {name}" in shown or f" fastbert {name}" in shown.partition("Examples")[2]
        assert f"fastbert {name}" in " ".join(runner.invoke(app, ["--help"]).stdout.split())


def test_version():
    assert runner.invoke(app, ["--version"]).stdout == f"fastbert {fastbert.__version__}\n"


def test_verify(model, monkeypatch):
    found = runner.invoke(app, ["verify", model, "--dtype", "float32", "--device", "cpu"])
    assert found.exit_code == 0, found.output
    first, *lines = found.stdout.splitlines()
    assert first.startswith(f"fastbert {fastbert.__version__}, CPU ")
    assert max(map(len, lines)) <= 80
    told = " ".join(found.stdout.split())
    assert "Random tokens instead of texts: no tokenizer can be loaded, there is no vocabulary" in told
    assert "fastbert gives transformers' results here" in told
    rows = [line.split() for line in lines if line.startswith((" Bert", "Bert"))]
    assert [row[0] for row in rows if row[-1] == "ok"][3:] == [
        "BertModel", "BertForPreTraining", "BertForMaskedLM", "BertForNextSentencePrediction",
        "BertForSequenceClassification", "BertForTokenClassification", "BertForMultipleChoice",
        "BertForQuestionAnswering",
    ]  # fmt: skip

    exact = eager.linear_activation
    monkeypatch.setattr(eager, "linear_activation", lambda *inputs: exact(*inputs) * 1.001)
    wrong = runner.invoke(app, ["verify", model, "--dtype", "float32"])
    assert wrong.exit_code == 1
    assert " MISS" in wrong.stdout
    assert "fastbert is WRONG here" in " ".join(wrong.stdout.split())


def test_bench(model, monkeypatch):
    monkeypatch.setattr(benchmark, "SHAPES", {"cpu": ((1, 8), (2, 16))})
    found = runner.invoke(app, ["bench", model, "--seconds", "0.01", "--dtype", "bfloat16", "--device", "cpu"])
    assert found.exit_code == 0, found.output
    assert "bfloat16, back end: eager" in found.stdout
    for case in ("1x8 full", "2x16 full", "2x16 50% filled"):
        assert f" {case} " in found.stdout


def test_bench_raises_before_it_prints_the_back_end(model, monkeypatch, no_interpreter):
    with fastbert.backend("triton"):
        found = runner.invoke(app, ["bench", model, "--device", "cpu"])
    assert found.exit_code == 2
    assert "back end" not in found.stdout
    assert found.stderr.startswith("fastbert: backend 'triton' cannot run ")


def test_info(monkeypatch):
    monkeypatch.setattr(backend, "why_eager", lambda op, device, dtype: "it is pool" if op == "pool" else None)
    monkeypatch.setenv("FASTBERT_CHECK", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    facts = dict(information.facts())
    assert facts["fastbert"] == fastbert.__version__
    supported = ", ".join(op for op in ops.OPS if op != "pool")
    assert facts["kernels on cpu"] == f"{supported}; pool in plain PyTorch: it is pool"
    assert facts["configurations on cpu"].endswith("configs/sm_90.json")
    assert (facts["FASTBERT_CHECK"], facts["FASTBERT_BACKEND"]) == ("1", "not set")
    assert facts["Triton cache"] == "/elsewhere"
    found = runner.invoke(app, ["info"])
    assert found.exit_code == 0, found.output
    assert all(name in found.stdout for name in facts)


def test_info_of_graphs_and_of_a_cold_start(monkeypatch, tmp_path):
    (tmp_path / "kernel").mkdir()
    (tmp_path / "kernel" / "compiled").write_bytes(bytes(3 << 20))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(graph_rules, "default", "on")
    facts = dict(information.facts())
    limits = "32 graphs and 1024 MiB a model, 16384 tokens a graph, 20 captures a minute"
    assert facts["CUDA graphs"] == f"on: at most {limits}"
    imports, kernels = facts["cold start"].split("; ")
    assert 0 < float(imports.removeprefix("imports: ").removesuffix(" s")) < 300
    assert kernels.startswith("kernels in Triton's cache: 3 MiB")
    monkeypatch.setattr(graph_rules, "default", "maybe")
    monkeypatch.setattr(information, "IMPORTS", "raise SystemExit('no torch')")
    facts = dict(information.facts())
    assert "choose one of off, auto, on" in facts["CUDA graphs"]
    assert facts["cold start"].startswith("the models cannot be imported: no torch")


def test_info_of_a_configuration_file(monkeypatch, tmp_path):
    from fastbert_kernels import configs

    shipped = configs.file_for("sm_90")
    own = tmp_path / "own.json"
    own.write_text(shipped.read_text())
    monkeypatch.setattr(backend, "why_eager", lambda op, device, dtype: None)
    monkeypatch.setenv("FASTBERT_CONFIGS", str(own))
    configs.table_for.cache_clear()
    facts = dict(information.facts())
    assert facts["kernels on cpu"] == "all"
    assert facts["configurations on cpu"] == str(own)
    own.write_text("{}")
    configs.table_for.cache_clear()
    assert "own.json: 'source' is missing" in dict(information.facts())["configurations on cpu"]
    monkeypatch.delenv("FASTBERT_CONFIGS")
    configs.table_for.cache_clear()


def test_info_without_kernels(no_interpreter):
    facts = dict(information.facts())
    assert facts["kernels on cpu"].startswith("all in plain PyTorch: the tensors are on 'cpu'")
    assert "configurations on cpu" not in facts
    assert backend.launch_configurations(information.torch.device("cpu")) is None


def test_info_without_triton():
    found = run_python("""
import sys
from importlib import metadata
class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoTriton())
version = metadata.version
def without(package):
    if package == "triton":
        raise metadata.PackageNotFoundError(package)
    return version(package)
metadata.version = without
sys.argv = ["fastbert", "info"]
from fastbert.cli import main
main()
""")
    assert found.returncode == 0, found.stderr
    lines = dict(line.split(maxsplit=1) for line in found.stdout.splitlines() if len(line.split(maxsplit=1)) == 2)
    assert lines["triton"].strip() == "not installed"
    assert "all in plain PyTorch" in found.stdout
    assert "Triton cache" not in found.stdout


def test_info_of_gpus(monkeypatch):
    class Properties:
        major, minor, total_memory = 9, 0, 80 * 2**30

    monkeypatch.setattr(information.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(information.torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(information.torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(machine, "_driver_version", lambda: "580.1")
    monkeypatch.setattr(information, "_operations", lambda device: ("all", []) if device.type == "cuda" else ("", []))
    monkeypatch.setattr(backend, "launch_configurations", lambda device: Path(f"/configs/{device.index}.json"))
    facts = dict(information.facts())
    assert facts["driver"] == "580.1"
    assert facts["cuda:1"] == "GPU 1, compute capability 9.0, 80 GiB"
    assert facts["configurations on cuda:1"] == "/configs/1.json"
    assert list(facts).index("cuda:0") < list(facts).index("cuda:1") < list(facts).index("cpu")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["verify", "/no/such"], "fastbert: there is no folder /no/such, and it is not a valid name on the hub\n"),
        (["bench", "/no/such"], "fastbert: there is no folder /no/such, and it is not a valid name on the hub\n"),
        (["encode", "/no/such", __file__, "-o", "/tmp/no-such.npy"], "fastbert: there is no folder /no/such, "),
        (["verify", "/no/such", "--device", "tpu"], "fastbert: there is no device 'tpu' here, only cpu"),
    ],
    ids=str,
)
def test_errors_are_one_line(arguments, told):
    found = runner.invoke(app, arguments)
    assert found.exit_code == 2
    assert found.stderr.startswith(told)
    assert found.stderr.count("\n") == 1
    assert not found.stdout


def test_a_model_that_is_no_bert_is_named(tmp_path):
    transformers.RobertaConfig().save_pretrained(tmp_path)
    found = runner.invoke(app, ["verify", str(tmp_path)])
    assert found.exit_code == 2
    assert found.stderr == (f"fastbert: {tmp_path} is a model of type 'roberta', but fastbert supports only 'bert'\n")


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (KeyboardInterrupt(), 130, "fastbert: interrupted\n"),
        (RuntimeError("one\n  two"), 2, "fastbert: one two\n"),
        (ImportError(), 2, "fastbert: ImportError\n"),
    ],
    ids=repr,
)
def test_expected_errors_become_one_line(error, status, told, monkeypatch):
    def raising():
        raise error

    monkeypatch.setattr(information, "table", raising)
    found = runner.invoke(app, ["info"])
    assert (found.exit_code, found.stderr) == (status, told)


@pytest.mark.parametrize("bug", [AttributeError, IndexError, KeyError, ZeroDivisionError])
def test_a_bug_keeps_its_traceback(bug, monkeypatch):
    def raising():
        raise bug("input_ids")

    monkeypatch.setattr(information, "table", raising)
    found = runner.invoke(app, ["info"])
    assert isinstance(found.exception, bug)
    assert not found.stderr


@pytest.mark.parametrize(
    "arguments", [["verfy"], ["verify"], ["verify", "x", "--frobnicate"], ["bench", "x", "--dtype", "int8"]], ids=str
)
def test_wrong_arguments_exit_with_two(arguments):
    found = runner.invoke(app, arguments)
    assert found.exit_code == 2
    assert "Usage: " in found.stderr


def test_the_entry_point(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastbert", "--version"])
    with pytest.raises(SystemExit) as exited:
        cli.main()
    assert exited.value.code == 0
    assert capsys.readouterr().out == f"fastbert {fastbert.__version__}\n"
