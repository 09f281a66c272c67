"""What decides a result: recipes, profiles, steps, run folders, kept rollouts."""
