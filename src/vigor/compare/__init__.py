"""Methods × seeds × worlds from one recipe: the plan, the runs, the statistics over seeds, and the table."""
