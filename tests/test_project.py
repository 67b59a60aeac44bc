"""The project's doors: workflows, templates, releases, and the locked environment."""

from __future__ import annotations

import re
import runpy
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support import ROOT

PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PROJECT = tomllib.loads(PYPROJECT)["project"]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / ".github/workflows").glob("*.yml"))
}
JOBS = [
    pytest.param(job, id=f"{workflow}-{name}")
    for workflow, content in WORKFLOWS.items()
    for name, job in content["jobs"].items()
]


def make_targets(command: str) -> list[str]:
    """The targets that a shell command makes."""
    return [
        word
        for call in re.findall(r"^make (.*)$", command, re.M)
        for word in call.split()
        if re.fullmatch("[a-z-]+", word)
    ]


def test_the_workflows_are_those_that_are_promised():
    triggers = {name: content[True] for name, content in WORKFLOWS.items()}  # YAML's `on`
    assert set(triggers["check"]) == {"push", "pull_request"}
    assert triggers["release"] == {"push": {"tags": ["v*"]}}
    assert "schedule" in triggers["nightly"]
    assert all(content["permissions"] == {"contents": "read"} for content in WORKFLOWS.values())


@pytest.mark.parametrize("job", JOBS)
def test_a_job_has_a_limit_and_pins_its_actions(job):
    assert job["timeout-minutes"] <= 120
    assert re.fullmatch(r"ubuntu-\d\d\.\d\d", job["runs-on"])
    for step in job["steps"]:
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])


@pytest.mark.parametrize("job", JOBS)
def test_a_job_makes_targets_that_there_are(job):
    for step in job["steps"]:
        command = step.get("run", "")
        assert set(make_targets(command)) <= TARGETS
        for script in re.findall(r"[\w./-]+\.py", command):
            assert (ROOT / script).is_file()


@pytest.mark.parametrize("job", JOBS)
def test_the_servers_that_tests_need_are_installed_before_them(job):
    """nginx and Prometheus are Debian's, not PyPI's; without them their tests are skipped."""
    commands = [step.get("run", "") for step in job["steps"]]
    tests = [place for place, one in enumerate(commands) if "test" in make_targets(one)]
    if tests:
        before = " ".join(commands[: tests[0]])
        assert re.search(r"apt-get install .*\bnginx-light prometheus\b", before)


def test_every_python_that_is_promised_is_checked():
    promised = [
        line.rpartition(" ")[2]
        for line in PROJECT["classifiers"]
        if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", line)
    ]
    assert promised
    for name in ("check", "nightly"):
        job = WORKFLOWS[name]["jobs"]["test"]
        assert job["strategy"]["matrix"]["python"] == promised
        made = [target for step in job["steps"] for target in make_targets(step.get("run", ""))]
        assert "test" in made


def test_the_check_is_the_gate_and_the_wheel_is_installed():
    jobs = WORKFLOWS["check"]["jobs"]
    made = [
        target
        for job in jobs.values()
        for step in job["steps"]
        for target in make_targets(step.get("run", ""))
    ]
    gate = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert {*make_targets(gate), "docs", "test-wheel"} <= set(made)


def test_only_the_last_step_of_a_release_may_publish():
    build, publish = (WORKFLOWS["release"]["jobs"][name] for name in ("build", "publish"))
    assert "permissions" not in build
    assert publish["needs"] == "build"
    assert publish["environment"] == "release"
    assert publish["permissions"] == {"id-token": "write"}


def test_the_hook_before_a_commit_is_the_check():
    content = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    [repository] = content["repos"]
    [hook] = repository["hooks"]
    assert repository["repo"] == "local"
    assert hook["language"] == "system"
    assert make_targets(hook["entry"]) == ["check"]
    assert hook["pass_filenames"] is False


@pytest.mark.parametrize("name", ["bug", "idea"])
def test_an_issue_form_has_what_a_form_needs(name):
    path = ROOT / f".github/ISSUE_TEMPLATE/{name}.yml"
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert all(field["attributes"]["label"] for field in fields)
    assert len({field["id"] for field in fields}) == len(fields)


problems = runpy.run_path(str(ROOT / ".github/check_release.py"))["problems"]


def test_a_complete_release_passes():
    pyproject = '[project]\nversion = "1.2.3"\n[project.urls]\nRepository = "somewhere"\n'
    assert problems("v1.2.3", pyproject, "# Changelog\n\n## 1.2.3 (2026-12-24)\n") == []


def test_what_a_release_lacks_is_named():
    pyproject = '[project]\nversion = "1.2.3"\n[project.urls]\n'
    found = problems("v1.2.4", pyproject, "## 1.2.3 (unreleased)\n")
    assert all(word in str(found) for word in ("tag v1.2.3", "write its date", "Repository"))
    assert len(found) == 3


def test_the_addresses_are_real_or_absent():
    for address in PROJECT["urls"].values():
        assert re.match(r"https://[\w.-]+/", address)
        assert not re.search(r"example|placeholder|OWNER|your", address)


def test_the_lock_has_what_the_development_environment_asks_for():
    """Run `make lock` when this fails: a requirement changed and the lock did not."""
    text = (ROOT / "requirements/dev.txt").read_text(encoding="utf-8")
    locked: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([\w.+]+)", text, re.M):
        locked.setdefault(canonicalize_name(name), []).append(version)
    for requirement in [*required("dev"), *map(Requirement, PROJECT["dependencies"])]:
        versions = locked.get(canonicalize_name(requirement.name), [])
        fitting = [version for version in versions if requirement.specifier.contains(version)]
        assert fitting, f"{requirement}: locked are {versions}"


def test_the_lock_has_a_digest_for_everything_and_names_no_index():
    text = (ROOT / "requirements/dev.txt").read_text(encoding="utf-8")
    entries = re.split(r"^(?=[\w.-]+==)", text, flags=re.M)[1:]
    assert len(entries) > 50
    assert all("--hash=sha256:" in entry for entry in entries)
    assert not re.search(r"https?://|file:|--(?:extra-)?index-url|--find-links", text)


def required(extra: str) -> list[Requirement]:
    """The requirements of an extra, with those of the extras that it names."""
    found = []
    for line in PROJECT["optional-dependencies"][extra]:
        requirement = Requirement(line)
        if requirement.name == "twotower":
            found += [one for name in sorted(requirement.extras) for one in required(name)]
        else:
            found.append(requirement)
    return found
