"""The report: what came out of runs, as text, HTML and figures."""
