"""What is minimised, a file each. learner/objectives/objective.py says what an objective is."""
