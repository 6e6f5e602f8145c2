"""Holds exported manifests against the models of Argo's own schema: PYTHON .ci/argo.py, with hera in its venv.

A field that the models do not know is an error, and so is a name that leads to no template, task or parameter.
"""
import json
import os
import re
import subprocess
import sys
import tempfile

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDERS = [os.path.join(REPO, "flows"), os.path.join(REPO, "..", "shared", "cases", "flows")]
MADE = {"name": "Made_1", "description": "{{ x }}", "max_parallel": 2, "timeout_s": 600, "fail_fast": True,
        "params": {"p": {"enum": ["a", "b"], "default": "a"}, "n": 3}, "env": {"A": "${{ params.p }}{{"},
        "tasks": [{"id": "1", "command": "echo $1 $$", "args": ["{{ y }}"], "stdin": "x", "cwd": "/"},
                  {"id": "in", "command": ["true"], "depends_on": ["1"], "foreach": [1, 2], "max_retries": 3,
                   "backoff_s": 0.5, "retry_on": [3, "timeout"], "timeout_s": 1.5, "allow_failure": True},
                  {"id": "c", "command": "true", "depends_on": ["1", "in"], "trigger_rule": "one_failed"},
                  {"id": "d", "command": "true", "depends_on": ["c", "1"]},
                  {"id": "e", "command": "true", "depends_on": ["d"], "trigger_rule": "none_failed"}],
        "on_success": {"command": "true"}, "on_failure": {"command": "true"}, "finally": {"command": "true"}}


def exported(path):
    """Return the manifest of a flow, or None where the flow needs what Argo can't do."""
    done = subprocess.run([sys.executable, os.path.join(REPO, "miniflow.py"), "-t", os.path.join(REPO, "tasks"),
                           "export", path, "--to", "argo"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0 or b"handed on" in done.stderr, done.stderr.decode()
    return json.loads(done.stdout) if done.returncode == 0 else None


def lost(given, kept, place=""):
    """Yield the places of what a model has not taken in."""
    pairs = given.items() if isinstance(given, dict) else enumerate(given) if isinstance(given, list) else ()
    for key, value in pairs:
        if isinstance(given, dict) and key not in kept:
            yield f"{place}/{key}"
        else:
            yield from lost(value, kept[key], f"{place}/{key}")


def names_to_nothing(spec):
    """Yield the names in a spec that lead nowhere, and those that Kubernetes would refuse."""
    templates = {template["name"]: template for template in spec["templates"]}
    params = {f"workflow.parameters.{each['name']}" for each in spec["arguments"]["parameters"]}
    text = json.dumps(spec)
    known = params | {"workflow.name", "workflow.status", "retries"}
    yield from set(re.findall(r"\{\{(.*?)\}\}", text)) - known
    yield from (name for name in templates if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name))
    steps = [step for template in templates.values() for group in template.get("steps", []) for step in group]
    tasks = templates[spec["entrypoint"]]["dag"]["tasks"]
    before = set()
    for task in tasks:                         # written in an order in which they can run
        yield from set(re.findall(r"([a-z0-9-]+)\.[A-Z]", task.get("depends", ""))) - before
        before.add(task["name"])
    yield from {each["template"] for each in tasks + steps} - templates.keys()
    yield from {spec.get("onExit", spec["entrypoint"])} - templates.keys()


def read_back(manifest):
    """Return what hera's models keep of a manifest."""
    from hera.workflows.models import CronWorkflow, Workflow
    model = CronWorkflow if manifest["kind"] == "CronWorkflow" else Workflow
    return json.loads(model.model_validate(manifest).model_dump_json(by_alias=True, exclude_none=True))


def main():
    """Check the manifests of all flows here; return the exit status."""
    paths = [os.path.join(folder, name) for folder in FOLDERS if os.path.isdir(folder)
             for name in sorted(os.listdir(folder)) if name.endswith(".json")]
    checked, wrong = 0, []
    with tempfile.TemporaryDirectory() as place:
        scheduled = {"schedule": {"cron": "@daily", "timezone": "Europe/Berlin"}}
        for name, more in (("scheduled", scheduled), ("made", {})):
            paths.append(os.path.join(place, f"{name}.json"))
            with open(paths[-1], "w") as file:
                json.dump({**MADE, **more}, file)
        for path in paths:
            manifest = exported(path)
            if manifest:
                spec = manifest["spec"].get("workflowSpec", manifest["spec"])
                wrong += [f"{path}: {what}" for what in (*lost(manifest, read_back(manifest)), *names_to_nothing(spec))]
                checked += 1
    manifest["spec"]["templates"][1]["retri"] = {}
    found = list(lost(manifest, read_back(manifest)))
    assert found == ["/spec/templates/1/retri"], "a field that is misspelt is not found"
    print("\n".join([*wrong, f"{checked} manifests, {len(wrong)} wrong"]))
    return 1 if wrong or not checked else 0


if __name__ == "__main__":
    sys.exit(main())
