"""The sample in Python: measurements are fetched from two stations at once, cleaned, and summed up.

    python3 miniflow.py run sample_python --param days=3
"""
import asyncio
import statistics

from miniflow import Workflow, task


def measure(station):
    """Return a task that fetches the readings of one station, as a service far away would give them."""
    @task(name=f"fetch_{station}", max_retries=2, backoff_s=0.5, timeout_s=10)
    async def fetch(ctx):
        await asyncio.sleep(0.05)
        days = int(ctx.get("days", 7))
        return {station: [len(station) + day % 5 * 0.5 for day in range(days)] + [-999.0]}
    return fetch


@task
def clean(ctx):
    """Throws out what no thermometer shows."""
    return {"clean": {name: [value for value in ctx[name] if value > -90] for name in ("harbour", "hill")}}


@task(process=True)
def summarise(ctx):
    """Sums up each station, in a process of its own."""
    for name, values in ctx["clean"].items():
        print(f"{name}: {len(values)} readings")
    return {"mean": {name: round(statistics.mean(values), 2) for name, values in ctx["clean"].items()}}


@task(trigger_rule="all_done")
def report(ctx):
    """Prints the result, also where a part of it is missing."""
    print("mean temperatures:", ctx.get("mean", "unknown"))


stations = [measure("harbour"), measure("hill")]
stations >> clean >> summarise >> report
workflow = Workflow([*stations, clean, summarise, report], description="the same kind of work as functions")

if __name__ == "__main__":
    print(workflow.run_sync())
