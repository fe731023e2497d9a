"""The experiment: settings, budgets and the plan. Nothing here needs torch, since Snakemake imports it."""
