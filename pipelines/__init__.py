"""The machine that runs any method: data, networks, training loop, records and reports."""
