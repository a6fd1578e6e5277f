"""Speed, memory and error of everything, beside what one might use instead."""
