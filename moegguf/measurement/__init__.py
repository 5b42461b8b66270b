"""What a mix is worth, in numbers and in pictures: tasks, scores, statistics of routing, figures.

A room of its own: numpy in, numbers out. It knows neither the runtime that produced the numbers nor the builder.
"""
