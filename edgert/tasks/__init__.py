"""A small set of questions, written for edgert: is what a model knows still there after its bits were taken?"""
