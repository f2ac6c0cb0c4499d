"""A batch: queue many jobs at once, wait for each, download its image."""

import os

from hidream import Client
from hidream.requests import submit_request

COLORS = ["red", "blue"]

with Client(os.environ.get("HIDREAM_ADDRESS", "localhost:8088")) as client:
    # All are accepted, or none; each goes on without this program.
    jobs = client.batch(
        submit_request(f"a {color} square on a white background", seed=1, labels={"set": "squares"})
        for color in COLORS
    )
    for color, job in zip(COLORS, jobs, strict=True):
        finished = client.wait(job)
        client.download(finished, f"{color}.png")
        print(f"{color}.png", f"{finished.timings.total.ToTimedelta().total_seconds():.2f} s")
        client.delete(finished)
