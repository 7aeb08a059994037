"""What is compiled: the train state and the functions of it."""
