"""Process raw readings: throw out what can't be right, and sum up each station.

usage: process_data.py READINGS.csv
"""
import csv
import json
import os
import statistics
import sys

COLDEST, HOTTEST = -60.0, 60.0                                      # what a thermometer in the open can see


def load(path):
    """Return the good readings of each station, and how many readings were missing and impossible."""
    good, missing, impossible = {}, 0, 0
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if not row["celsius"]:
                missing += 1
            elif not COLDEST <= float(row["celsius"]) <= HOTTEST:
                impossible += 1
            else:
                good.setdefault(row["station"], []).append((row["hour"], float(row["celsius"])))
    return good, missing, impossible


def sum_up(readings):
    """Return what a station's (hour, celsius) readings amount to."""
    values = [celsius for _, celsius in readings]
    return {
        "readings": len(values),
        "mean": round(statistics.fmean(values), 2),
        "stdev": round(statistics.pstdev(values), 2),
        "coldest": min((celsius, hour) for hour, celsius in readings),
        "hottest": max((celsius, hour) for hour, celsius in readings),
    }


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    good, missing, impossible = load(sys.argv[1])
    if not good:
        sys.exit(f"{sys.argv[1]}: not one good reading")
    stations = {station: sum_up(readings) for station, readings in good.items()}
    for station, summary in stations.items():
        print(f"{station}: {summary['readings']} readings, mean {summary['mean']} degrees Celsius")
    print(f"thrown out: {missing} missing, {impossible} impossible")

    if "MINIFLOW_OUTPUT" in os.environ:
        with open(os.environ["MINIFLOW_OUTPUT"], "w", encoding="utf-8") as file:
            json.dump({"stations": stations, "missing": missing, "impossible": impossible}, file)


if __name__ == "__main__":
    main()
