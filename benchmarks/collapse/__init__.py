"""The experiment of docs/results/collapse.md: at which peak rates networks with Post-LN layers collapse."""
