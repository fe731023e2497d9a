"""Training: the loop, its resume states, its jobs, and the processes of a distributed run."""
