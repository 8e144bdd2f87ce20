"""How the documents of a sample are named to a person."""

from torch.utils.data import Dataset

from megatron_sat.data.whereabouts import Whereabouts
from megatron_sat.training.response import Samples


class Placed(Dataset):
    """Sample 0 holds documents of two files, sample 1 many of one."""

    def whereabouts(self, sample: int) -> tuple[Whereabouts, ...]:
        if sample == 0:
            return (Whereabouts(prefix="/a", documents=(4, 2)), Whereabouts(prefix="/b", documents=(7,)))
        return (Whereabouts(prefix="/b", documents=tuple(range(9))),)


def documents(dataset: Dataset, sample: int) -> str:
    return Samples(dataset=dataset, names={"/a": "law"}, micro_batch_size=1, dp_size=1).documents(sample)


def test_a_window_of_several_files_names_the_documents_of_each():
    assert documents(Placed(), 0) == "law 4, 2 and /b 7"


def test_of_many_documents_some_are_named():
    assert documents(Placed(), 1) == "/b 0, 1, 2, 3, 4, 5, 6, 7 ..."


def test_a_data_set_that_does_not_know_is_said_so():
    assert documents(Dataset(), 0) == "of unknown documents"
