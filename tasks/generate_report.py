"""Generate the report: write what the tasks upstream handed on as one JSON document.

usage: generate_report.py --output=FILE     (the context comes from $MINIFLOW_CONTEXT)
"""
import argparse
import json
import os
import sys


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", required=True)
    path = parser.parse_args().output

    if "MINIFLOW_CONTEXT" not in os.environ:
        sys.exit("this script reports on a run; start it by: miniflow run sample_flow")
    with open(os.environ["MINIFLOW_CONTEXT"], encoding="utf-8") as file:
        ctx = json.load(file)["ctx"]

    used = sum(summary["readings"] for summary in ctx["stations"].values())
    report = {
        "title": f"Temperatures over {ctx['days']} days",
        "run": os.environ["MINIFLOW_RUN_ID"],
        "readings": {"fetched": ctx["rows"], "used": used, "missing": ctx["missing"],
                     "impossible": ctx["impossible"]},
        "warmest_station": max(ctx["stations"], key=lambda name: ctx["stations"][name]["mean"]),
        "stations": ctx["stations"],
    }
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(report, file, indent=2)
        file.write("\n")
    print(f"report of {used} readings: {os.path.abspath(path)}")

    with open(os.environ["MINIFLOW_OUTPUT"], "w", encoding="utf-8") as file:
        json.dump({"report": os.path.abspath(path)}, file)


if __name__ == "__main__":
    main()
