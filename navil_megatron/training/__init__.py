"""One step after another: optimizer, schedule, state, the step itself and the loop around it."""
