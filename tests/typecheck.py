"""The type checker that the tests put on the tensor rooms: beartype, with int accepted where float is expected."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
