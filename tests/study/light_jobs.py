"""Jobs for processes of a study that import nothing but torch."""

import logging

import torch


def threads_of_a_process():
    return str(torch.get_num_threads())


def refuse(name):
    return f"{name}: refused"


def warn(name):
    logging.getLogger(name).warning("a library's warning of %s", name)
