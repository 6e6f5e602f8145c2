"""A program that uses all of the Python API, for mypy --strict: it has to pass with the installed package."""
import asyncio
from typing import Any, Dict
from miniflow import (FlowFailed, JSONStateStore, MemoryStateStore, MiniFlow, NoRetry, RetryError, Run, Workflow, task)

@task(max_retries=2, backoff_s=0.5, retry_on=[OSError])
async def fetch(ctx: Dict[str, Any]) -> Dict[str, Any]:
    return {"items": [1, 2]}

@task
def total(ctx: Dict[str, Any]) -> Dict[str, Any]:
    if not ctx["items"]:
        raise NoRetry("none")
    return {"total": sum(ctx["items"])}

@task(process=True)
def report(ctx: Dict[str, Any]) -> None:
    raise RetryError("x")

fetch >> [total, report]
[fetch, total] >> report
report << fetch
workflow = Workflow([fetch, total, report], name="demo", max_concurrent_tasks=3)

async def main() -> Dict[str, Any]:
    store = JSONStateStore("./data")
    result = await workflow.run("r", store, {"user": "demo"})
    print(total({"items": [1]}), store.list_runs(status="failed"), store.get_task("r", "fetch"))
    store.cleanup_old_runs(days=30)
    return result

try:
    workflow.run_sync(store=MemoryStateStore())
except FlowFailed as exc:
    print(exc.run.tasks)
run: Run = MiniFlow().run("x")
print(run.ok, run.status, workflow.visualize())
asyncio.run(main())
