"""Names of one parameter: found by name, decided by what is stored, whatever config.json says."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests.unit.inputs.catalogues import Shape, checkpoint
from ties_dist.checkpoints.catalogue import Checkpoint
from ties_dist.checkpoints.parameters import Parameter
from ties_dist.errors import CheckpointError
from ties_dist.inputs.aliases import Aliases, find_aliases, lone_embedding, with_every_name
from ties_dist.inputs.congruence import MergeSet, compare

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
TIED: dict[str, object] = {"tie_word_embeddings": True}
UNTIED: dict[str, object] = {"tie_word_embeddings": False}
LLAMA: dict[str, object] = {"architectures": ["LlamaForCausalLM"]}

Contents = Mapping[str, str]
"""A tensor's name -> a letter that stands for its numbers."""


def model(
    contents: Contents, config: Mapping[str, object] | None = None, name: str = "x"
) -> tuple[Checkpoint, Contents]:
    shapes: dict[str, tuple[str, Shape]] = {
        tensor: ("BF16", (4,) if tensor.endswith((".bias", "norm.weight")) else (10, 4)) for tensor in contents
    }
    return checkpoint(name, shapes, config), contents


def found(*models: tuple[Checkpoint, Contents], **options: Any) -> Aliases:
    """The first model is the base. Only tensors of one shape are ever compared, and no pair twice in a model."""

    def same(i: int, left: Parameter, right: Parameter) -> bool:
        return left.shape == right.shape and models[i][1][left.name] == models[i][1][right.name]

    return find_aliases([catalogue for catalogue, _ in models], same, **options)


def merged(*models: tuple[Checkpoint, Contents], exclude: Sequence[str] = (), **options: Any) -> MergeSet:
    aliases = found(*models, exclude=exclude, **options)
    base, *experts = (aliases.fold(catalogue) for catalogue, _ in models)
    return compare(base, experts, aliases=aliases, exclude=exclude, non_float="error", operand="delta")


def refusal(*models: tuple[Checkpoint, Contents], **options: Any) -> str:
    with pytest.raises(CheckpointError, match=r"do not (match|fit) the base") as error:
        merged(*models, **options)
    return str(error.value)


def sources(merge_set: MergeSet) -> dict[str, str]:
    return {tensor.name: tensor.source for tensor in merge_set.tensors}


ONCE = {EMBED: "e", NORM: "n"}
TWICE = {EMBED: "e", HEAD: "e", NORM: "n"}
HEAD_ALONE = {HEAD: "e", NORM: "n"}
APART = {EMBED: "e", HEAD: "h", NORM: "n"}


# -- one parameter ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [None, {}, TIED, UNTIED, LLAMA])
@pytest.mark.parametrize("base", [ONCE, TWICE])
@pytest.mark.parametrize("expert", [ONCE, TWICE, HEAD_ALONE])
def test_a_model_stored_once_or_twice_has_each_parameter_once(
    config: dict[str, object] | None, base: Contents, expert: Contents
) -> None:
    merge_set = merged(model(base, config), model(expert, config), model(TWICE))
    assert sources(merge_set) == {name: EMBED if name == HEAD else name for name in base}
    assert merge_set.elements == 40 + 4


@pytest.mark.parametrize("config", [None, {}, TIED, LLAMA])
def test_a_base_that_stores_the_head_alone_has_the_embedding(config: dict[str, object] | None) -> None:
    merge_set = merged(model(HEAD_ALONE, config), model(ONCE), model(TWICE))
    assert [(t.name, t.source, t.counted) for t in merge_set.tensors] == [(HEAD, EMBED, True), (NORM, NORM, True)]


def test_the_canonical_name_is_the_embeddings_though_nobody_stores_it() -> None:
    gpt = {"architectures": ["OpenAIGPTLMHeadModel"]}  # of which transformers 5 saves the head
    merge_set = merged(model({HEAD: "e"}, gpt), model({HEAD: "e"}, gpt))
    assert sources(merge_set) == {HEAD: "transformer.tokens_embed.weight"}
    assert sources(merged(model({HEAD: "e"}), model({HEAD: "e"}))) == {HEAD: HEAD}


def test_a_head_that_only_an_expert_stores_is_dropped_where_it_is_its_embedding() -> None:
    merge_set = merged(model(ONCE), model(TWICE, name="math"))
    assert sources(merge_set) == {EMBED: EMBED, NORM: NORM}
    assert merge_set.notes == (f"expert 'math': {HEAD}, tied to {EMBED}, is dropped",)


def test_what_is_counted_once_is_said() -> None:
    assert merged(model(TWICE), model(ONCE)).notes == (f"{HEAD} is tied to {EMBED} and counted once",)


T5 = ["shared.weight", "decoder.embed_tokens.weight", "encoder.embed_tokens.weight", HEAD]


def test_a_parameter_with_four_names_is_counted_once() -> None:
    merge_set = merged(model(dict.fromkeys(T5, "e")), model({"encoder.embed_tokens.weight": "e"}))
    assert sources(merge_set) == dict.fromkeys(T5, "shared.weight")
    assert merge_set.elements == 40
    assert [t.name for t in merge_set.tensors if t.counted] == ["shared.weight"]
    assert merge_set.notes == (
        "decoder.embed_tokens.weight and 2 more names are tied to shared.weight and counted once",
    )


def test_of_four_names_one_may_be_a_parameter_of_its_own() -> None:
    # T5 v1.1 as transformers 5 saves it.
    base = dict.fromkeys(T5, "e") | {HEAD: "h"}
    merge_set = merged(model(base, TIED), model({"shared.weight": "f", HEAD: "g"}, TIED))
    assert sources(merge_set) == dict.fromkeys(T5, "shared.weight") | {HEAD: HEAD}
    assert "differ and are two parameters, though config.json says tie_word_embeddings: true" in merge_set.notes[1]


def test_biases_of_heads_are_known_by_the_table() -> None:
    bias, copy = "cls.predictions.bias", "cls.predictions.decoder.bias"
    merge_set = merged(model({bias: "b", copy: "b"}), model({copy: "c"}))
    assert sources(merge_set) == {bias: bias, copy: bias}
    roberta = merged(model({"lm_head.bias": "b", "lm_head.decoder.bias": "b"}), model({"lm_head.bias": "c"}))
    assert roberta.elements == 4


def test_numbered_modules_are_known_by_the_table() -> None:
    """Of an object detector without refinement: all heads are one module."""
    names = [f"bbox_embed.{i}.layers.{k}.{what}" for i in range(12) for k in range(2) for what in ("weight", "bias")]
    contents = {name: f"layer {name.split('.')[3]} {name.split('.')[4]}" for name in names}
    merge_set = merged(model(contents), model(contents))
    assert set(sources(merge_set).values()) == {name for name in names if name.startswith("bbox_embed.0.")}
    refined = {name: name for name in names}
    assert sources(merged(model(refined), model(refined))) == {name: name for name in names}


@pytest.mark.parametrize(
    ("head", "embedding"),
    [
        ("lm_head.weight", "transformer.wte.weight"),
        ("embed_out.weight", "gpt_neox.embed_in.weight"),
        ("output.weight", "model.tok_embeddings.weight"),
        ("transformer.output_layer.weight", "transformer.embedding.word_embeddings.weight"),
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),
        ("proj_out.weight", "model.decoder.embed_tokens.weight"),
        ("lm_head.weight", "shared.weight"),
        ("lm_head.weight", "backbone.embeddings.weight"),
        ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),
        ("a_family.of_its_own.lm_head.weight", "some.body.embed_tokens.weight"),
    ],
)
def test_heads_and_embeddings_are_known_by_the_names_families_give_them(head: str, embedding: str) -> None:
    merge_set = merged(model({head: "e", embedding: "e"}), model({embedding: "f"}))
    assert sources(merge_set) == {head: embedding, embedding: embedding}


def test_nothing_else_is_one_parameter_however_equal() -> None:
    names = ["h.0.ln.bias", "h.1.ln.bias", "a.norm.weight", "b.norm.weight", "wpe.weight", "wte.weight", "w.bias"]
    names += ["model.layers.0.output.weight", "model.layers.1.output.weight"]
    merge_set = merged(model(dict.fromkeys(names, "0")), model(dict.fromkeys(names, "0")))
    assert sources(merge_set) == {name: name for name in names}


def test_a_head_is_tied_to_the_embedding_that_it_equals() -> None:
    contents = {"talker.embed_tokens.weight": "t", "thinker.embed_tokens.weight": "e", "thinker.lm_head.weight": "e"}
    assert sources(merged(model(contents), model(contents)))["thinker.lm_head.weight"] == "thinker.embed_tokens.weight"


def test_equal_in_the_base_alone_is_not_one_parameter() -> None:
    """Two encoders that a base was made of from one model."""
    one, two = "encoder.embeddings.word_embeddings.weight", "decoder.bert.embeddings.word_embeddings.weight"
    merge_set = merged(model({one: "e", two: "e"}), model({one: "a", two: "b"}))
    assert sources(merge_set) == {one: one, two: two}
    assert merge_set.notes == (f"{two} and {one} are equal in the base and two parameters",)


def test_a_store_of_statistics_has_the_names_of_its_model() -> None:
    aliases = found(model(TWICE), model(TWICE))
    store, _ = model({EMBED: "F", HEAD: "zeros", NORM: "F"})
    folded = aliases.fold(store)
    assert folded.parameters.keys() == {EMBED, NORM}
    assert folded.parameters[EMBED].view == store.parameters[EMBED].view


def test_a_model_in_which_nothing_is_called_otherwise_stays_the_object_that_it_is() -> None:
    catalogue, _ = model(APART)
    assert found(model(APART), model(APART)).fold(catalogue) is catalogue


# -- exclude ----------------------------------------------------------------------------------------------------------


def test_a_parameter_is_excluded_by_its_canonical_name() -> None:
    merge_set = merged(model(TWICE), model(APART), exclude=[EMBED])
    assert {t.name: (t.action, t.source) for t in merge_set.tensors} == {
        HEAD: ("copy", EMBED),
        EMBED: ("copy", EMBED),
        NORM: ("merge", NORM),
    }


def test_excluding_another_name_of_it_changes_nothing_and_is_said() -> None:
    merge_set = merged(model(TWICE), model(TWICE), exclude=["lm_head*"])
    assert merge_set.elements == 44
    assert f"exclude: {HEAD} is merged, as {EMBED} is, whose other name it is" in merge_set.notes


def test_an_excluded_head_that_only_an_expert_stores_is_simply_left_out() -> None:
    assert sources(merged(model(ONCE), model(APART), exclude=["lm_head*"])) == {EMBED: EMBED, NORM: NORM}


def test_a_head_of_its_own_is_merged_where_the_embedding_is_excluded() -> None:
    merge_set = merged(model(APART), model(APART), exclude=[EMBED])
    assert {t.name: t.action for t in merge_set.tensors} == {HEAD: "merge", EMBED: "copy", NORM: "merge"}


# -- untying ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [ONCE, TWICE, HEAD_ALONE])
@pytest.mark.parametrize("config", [None, {}, TIED, LLAMA])
def test_an_expert_that_unties_is_refused_with_what_to_do(base: Contents, config: dict[str, object] | None) -> None:
    message = refusal(model(base, config), model(ONCE), model(APART, name="math"))
    assert message == (
        "the models do not fit the base:\n"
        f"  expert 'math': {EMBED} and {HEAD} differ, and are one parameter in the base.\n"
        "`tie_word_embeddings: false` in `ties_dist:` makes the head a parameter of its own, and config.json say so."
    )


@pytest.mark.parametrize("base", [ONCE, TWICE, HEAD_ALONE])
def test_an_untied_head_is_a_parameter_that_models_without_one_have_too(base: Contents) -> None:
    models = model(base), model(ONCE), model(APART)
    merge_set = merged(*models, untie=True)
    assert sources(merge_set) == {name: name for name in APART}
    assert merge_set.elements == 40 + 40 + 4
    folded = found(*models, untie=True).fold(models[1][0])
    assert folded.parameters[HEAD].view == folded.parameters[EMBED].view


def test_a_base_that_says_it_is_untied_has_two_parameters() -> None:
    assert merged(model(TWICE, UNTIED), model(APART, UNTIED)).elements == 40 + 40 + 4
    assert f"{HEAD}: extra in expert 'x', base does not have it" in refusal(model(ONCE, UNTIED), model(APART))


def test_a_tied_expert_without_the_head_of_an_untied_base_is_refused() -> None:
    message = refusal(model(APART, UNTIED), model(ONCE, TIED))
    assert f"{HEAD}: missing in expert 'x' (its config.json says tie_word_embeddings: true)" in message


def test_the_untied_heads_name_is_the_classs_where_no_model_stores_one() -> None:
    gpt2 = {"architectures": ["GPT2LMHeadModel"]}
    merge_set = merged(model({"transformer.wte.weight": "e"}, gpt2), model({"transformer.wte.weight": "f"}), untie=True)
    assert sources(merge_set) == {"transformer.wte.weight": "transformer.wte.weight", HEAD: HEAD}
    old = merged(model({"wte.weight": "e"}, gpt2), model({"wte.weight": "f"}), untie=True)
    assert sources(old) == {"wte.weight": "wte.weight", HEAD: HEAD}


def test_with_the_head_all_names_of_the_class_are_untied_and_written() -> None:
    bart = {"architectures": ["BartForConditionalGeneration"]}
    merge_set = merged(model({"model.shared.weight": "e"}, bart), model({"model.shared.weight": "f"}), untie=True)
    assert sources(merge_set) == {
        "lm_head.weight": "lm_head.weight",
        "model.decoder.embed_tokens.weight": "model.shared.weight",
        "model.encoder.embed_tokens.weight": "model.shared.weight",
        "model.shared.weight": "model.shared.weight",
    }
    assert merge_set.elements == 80
    words, bias = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"
    bert = model({words: "e", bias: "b"}, {"architectures": ["BertForMaskedLM"]})
    assert sources(merged(bert, bert, untie=True)) == {
        words: words,
        bias: bias,
        "cls.predictions.decoder.bias": bias,
        "cls.predictions.decoder.weight": "cls.predictions.decoder.weight",
    }


@pytest.mark.parametrize("config", [None, {}, UNTIED, {"architectures": ["LlamaModel"]}])
def test_untying_what_is_not_known_to_be_tied_is_refused(config: dict[str, object] | None) -> None:
    message = refusal(model(ONCE, config), model(ONCE), untie=True)
    assert (
        "`tie_word_embeddings: false`: no head is known that the base ties to its embedding. Leave it out." in message
    )


def test_a_family_that_scales_by_the_key_stays_tied() -> None:
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    base, expert = model({"shared.weight": "e"}, config), model({"shared.weight": "e", HEAD: "h"}, config, name="qa")
    message = refusal(base, expert)
    assert "expert 'qa': shared.weight and lm_head.weight differ, and are one parameter in the base." in message
    assert message.endswith("so they stay tied: `exclude: ['shared.weight']` keeps the base's embedding and head.")
    assert sources(merged(base, expert, exclude=["shared.weight"])) == {"shared.weight": "shared.weight"}
    assert "scale their output by that key. Leave it out." in refusal(base, base, untie=True)


def test_an_expert_that_parts_names_of_one_embedding_is_refused_with_what_to_do() -> None:
    bart = {"architectures": ["BartForConditionalGeneration"]}
    base = model({"model.shared.weight": "e"}, bart)
    expert = model({"model.shared.weight": "e", "model.encoder.embed_tokens.weight": "f"}, bart, name="sum")
    message = refusal(base, expert)
    assert "'sum': model.shared.weight and model.encoder.embed_tokens.weight differ, and are one parameter" in message
    assert message.endswith("`exclude: ['model.shared.weight']` keeps the base's.")
    assert sources(merged(base, expert, exclude=["model.shared.weight"])) == {
        "model.shared.weight": "model.shared.weight"
    }


# -- for adapters, the names that a class has -------------------------------------------------------------------------


def names(catalogue: Checkpoint) -> set[str]:
    return set(catalogue.parameters)


def test_an_adapter_finds_the_head_that_its_base_does_not_store() -> None:
    base, _ = model(ONCE, LLAMA)
    for wanted in ([EMBED], [HEAD], [EMBED, HEAD]):
        extended = with_every_name(base, wanted)
        assert names(extended) == {EMBED, HEAD, NORM}
        assert extended.parameters[HEAD].view == base.parameters[EMBED].view
    assert with_every_name(base, [NORM]) is base


def test_of_a_class_that_is_not_known_an_adapter_finds_what_it_names_itself() -> None:
    base, _ = model({"body.wte.weight": "e", NORM: "n"})
    assert names(with_every_name(base, ["lm_head.weight"])) == {"body.wte.weight", "lm_head.weight", NORM}
    assert with_every_name(base, ["body.wte.weight"]) is base
    assert with_every_name(base, ["classifier.weight"]) is base


def test_a_model_that_says_it_is_untied_has_no_other_names() -> None:
    base, _ = model(ONCE, {**LLAMA, **UNTIED})
    assert with_every_name(base, [HEAD]) is base


def test_a_class_may_have_several_names_for_it_and_an_old_checkpoint_shorter_ones() -> None:
    t5, _ = model({"shared.weight": "e"}, {"architectures": ["T5ForConditionalGeneration"]})
    assert names(with_every_name(t5, [HEAD])) == set(T5)
    gpt2, _ = model({"wte.weight": "e"}, {"architectures": ["GPT2LMHeadModel"]})
    assert names(with_every_name(gpt2, ["transformer.wte.weight"])) == {"wte.weight", HEAD}


def test_an_embedding_whose_head_has_no_known_name_is_told_of() -> None:
    odd: dict[str, object] = {"architectures": ["OddForCausalLM"]}
    base, _ = model({"body.wte.weight": "e", NORM: "n"}, odd)
    assert lone_embedding(base, ["body.wte.weight", NORM]) == "body.wte.weight"
    assert lone_embedding(base, [NORM]) is None
    said, _ = model({"body.wte.weight": "e"})
    assert lone_embedding(said, ["body.wte.weight"]) is None
    assert lone_embedding(said, ["body.wte.weight"], ["CAUSAL_LM"]) == "body.wte.weight"


@pytest.mark.parametrize(
    ("contents", "config"),
    [
        ({EMBED: "e"}, {"architectures": ["OddForCausalLM"], **UNTIED}),
        ({EMBED: "e", HEAD: "e"}, {"architectures": ["OddForCausalLM"]}),
        ({EMBED: "e"}, {"architectures": ["OddForSequenceClassification"]}),
        ({EMBED: "e"}, LLAMA),
    ],
    ids=["untied", "stored", "classifier", "known"],
)
def test_an_embedding_may_be_alone_where_its_head_is_known_or_there_is_none(
    contents: Contents, config: dict[str, object]
) -> None:
    base, _ = model(contents, config)
    assert lone_embedding(with_every_name(base, [EMBED]), [EMBED]) is None


# -- cost -------------------------------------------------------------------------------------------------------------


def test_two_hundred_thousand_names_are_looked_through_in_a_moment() -> None:
    tensors = {f"model.layers.{i}.mlp.experts.{j}.down_proj.weight": "w" for i in range(200) for j in range(1000)}
    models = [model({**tensors, **TWICE})[0]] * 3
    start = time.process_time()
    aliases = find_aliases(models, lambda i, left, right: True)
    assert dict(aliases.canonical) == {HEAD: EMBED}
    assert time.process_time() - start < 3.0
