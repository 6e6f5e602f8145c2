"""Fetch raw readings: write a CSV of hourly temperatures, as weather stations send them.

Stations are not to be trusted: now and then a reading is missing, or is one that no thermometer in the open
can have seen.  The readings are made here, from the station's name and the hour alone, so that the same days
always give the same file and the sample needs no network.

usage: fetch_data.py --days=N --output=FILE.csv
"""
import argparse
import csv
import json
import math
import os
import random
from datetime import datetime, timedelta

STATIONS = {"harbour": 11.0, "hilltop": 6.5, "old_town": 13.0}      # name: mean temperature in °C
FIRST_HOUR = datetime(2026, 1, 1)


def reading(station, hour):
    """Return the temperature at a station in an hour as text, the way the station sent it."""
    chance = random.Random(f"{station} {hour.isoformat()}")
    if chance.random() < 0.01:
        return ""                                                   # the line was down
    if chance.random() < 0.005:
        return "999.9"                                              # the sensor was
    season = -9 * math.cos(2 * math.pi * hour.timetuple().tm_yday / 365)
    day = -4 * math.cos(2 * math.pi * (hour.hour - 3) / 24)
    return f"{STATIONS[station] + season + day + chance.gauss(0, 1.5):.1f}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--output", default="readings.csv")
    options = parser.parse_args()

    path = os.path.abspath(options.output)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    hours = [FIRST_HOUR + timedelta(hours=n) for n in range(24 * options.days)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["station", "hour", "celsius"])
        for station in STATIONS:
            writer.writerows([station, hour.isoformat(), reading(station, hour)] for hour in hours)
    rows = len(hours) * len(STATIONS)
    print(f"{rows} readings of {len(STATIONS)} stations in {path}")

    if "MINIFLOW_OUTPUT" in os.environ:                             # hand the path on to the tasks downstream
        with open(os.environ["MINIFLOW_OUTPUT"], "w", encoding="utf-8") as file:
            json.dump({"raw": path, "rows": rows}, file)


if __name__ == "__main__":
    main()
