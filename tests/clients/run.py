"""Other packages' own code over converted models: the numbers that it has with torch.nn.

    python tests/clients/run.py            # all clients
    python tests/clients/run.py torchrl    # these

Every client runs once with torch.nn's modules and once with a converted copy of them. A line is printed for each; the
exit status is 1 if one failed. What is not installed (requirements.txt) is passed over.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

import rnnfast
from rnnfast import functional

TOLERANCE = {torch.float32: (1e-4, 1e-5), torch.float64: (1e-9, 1e-11)}  # rtol, atol
CLIENTS: dict[str, Callable[[Comparison], None]] = {}


def client(distribution: str) -> Callable:
    """Register a function, whose docstring says what it runs, under the name of the package on PyPI."""

    def register(function: Callable[[Comparison], None]) -> Callable[[Comparison], None]:
        CLIENTS[distribution] = function
        return function

    return register


class Comparison:
    """Of what a client gives with our layers and with torch.nn's."""

    largest = 0.0

    def same(self, ours: Any, theirs: Any) -> None:
        """Nested tensors and arrays are close; anything else, numbers by themselves too, is equal."""
        ours, theirs = pytree.tree_flatten(ours), pytree.tree_flatten(theirs)
        assert ours[1] == theirs[1], f"{ours[1]} is not {theirs[1]}"
        for a, b in zip(ours[0], theirs[0]):
            if not isinstance(b, (torch.Tensor, np.ndarray)):
                assert a == b, f"{a!r} is not {b!r}"
                continue
            a, b = torch.as_tensor(a), torch.as_tensor(b)
            rtol, atol = TOLERANCE.get(b.dtype, (0, 0))
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
            if b.is_floating_point() and b.numel():
                self.largest = max(self.largest, (a - b).abs().max().item())

    def runs(self, model: nn.Module, run: Callable[[nn.Module], Any]) -> nn.Module:
        """Outputs and gradients of `run(model)` with both; returns the converted model."""
        ours = converted(model)
        self.same(outputs_and_gradients(ours, run), outputs_and_gradients(model, run))
        return ours


def converted(model: nn.Module) -> nn.Module:
    ours = rnnfast.convert(copy.deepcopy(model))
    assert_converted(ours, model)
    return ours


def assert_converted(ours: nn.Module, theirs: nn.Module) -> None:
    """Every recurrent layer is ours, and of its class still: many a client asks for isinstance(m, torch.nn.LSTM)."""
    report = ours.rnnfast_report
    assert report.converted and not report.left_alone, report
    for name in report.converted:
        assert isinstance(ours.get_submodule(name), type(theirs.get_submodule(name)))


def outputs_and_gradients(model: nn.Module, run: Callable[[nn.Module], Any]) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(1)  # of dropout
    outputs = run(model)
    loss = sum(
        out.square().sum() for out in pytree.tree_leaves(outputs) if isinstance(out, torch.Tensor) and out.requires_grad
    )
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    return outputs, dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True)))


@client("torchrl")
def torchrl(compare: Comparison) -> None:
    """LSTMModule, GRUModule: steps; rollouts with episodes inside; weights from a TensorDict"""
    from tensordict import TensorDict, from_module
    from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode

    N, T, I, H, L = 3, 7, 4, 5, 2
    is_init = torch.zeros(N, T, 1, dtype=torch.bool)
    is_init[0, 3] = is_init[1, 0] = is_init[1, 2] = is_init[2, 6] = True
    x = torch.randn(N, T, I, dtype=torch.float64)

    def client_of(cls, attribute, states):
        keys = {"in_keys": ["x", *states], "out_keys": ["y", *(("next", state) for state in states)]}

        def outputs(td):
            return [td["y"], *(td["next", state] for state in states)]

        def rollout(module):
            td = TensorDict({"x": x, **{state: x.new_zeros(N, T, L, H) for state in states}}, [N, T])
            with set_recurrent_mode(True):
                return outputs(module(td.to(next(module.parameters()).dtype).set("is_init", is_init)))

        def steps(module):
            carry, ys = {state: x.new_zeros(N, L, H) for state in states}, []
            for t in range(T):
                y, *new = outputs(module(TensorDict({"x": x[:, t], "is_init": is_init[:, t], **carry}, [N])))
                carry = dict(zip(states, new))
                ys.append(y)
            return torch.stack(ys, 1), carry

        def rollout_with_other_weights(module):
            with from_module(module).apply(lambda weight: weight * 0.5).to_module(module):
                return rollout(module)

        module = cls(I, H, L, **keys).double()
        compare.runs(module, rollout)
        compare.runs(module, steps)
        compare.runs(module, rollout_with_other_weights)
        compare.runs(cls(I, H, L, recurrent_backend="scan", **keys).double(), rollout)  # torchrl's, over our weights
        ours = converted(module.float())  # the layer that make_python_based makes checks for float32
        layer = getattr(ours, attribute)
        assert getattr(ours.make_cudnn_based(), attribute) is layer  # it is an instance of torch.nn's class
        compare.same(rollout(ours.make_python_based()), rollout(module))

    client_of(LSTMModule, "lstm", ["h", "c"])
    client_of(GRUModule, "gru", ["h"])


@client("rsl-rl-lib")
def rsl_rl(compare: Comparison) -> None:
    """RNNModel, LSTM and GRU: rollout, update with masks, as_jit scripted, as_onnx in onnxruntime"""
    import onnxruntime
    from rsl_rl.models.rnn_model import RNNModel
    from tensordict import TensorDict

    N, T, I, H, L = 3, 5, 4, 5, 2
    obs = torch.randn(T, N, I)
    alone = obs[:, :1]  # what is exported takes one environment

    def rollout(model, obs=obs):
        model.reset()
        actions = []
        for t, x in enumerate(obs):
            actions.append(model(TensorDict({"policy": x}, [len(x)])))
            if t == 2:
                model.detach_hidden_state()
                model.reset(dones=torch.arange(len(x)) == 1)
        state = model.get_hidden_state()
        model.reset()
        return torch.stack(actions), state

    def update(model):
        masks = torch.arange(T)[:, None] < torch.tensor([5, 3, 2])
        state = torch.ones(L, N, H)
        state = (state, state) if isinstance(model.rnn.rnn, nn.LSTM) else state
        return model(TensorDict({"policy": obs}, [T, N]), masks, state)

    def in_onnxruntime(model, dynamo):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "policy.onnx")
            names = {"input_names": model.input_names, "output_names": model.output_names}
            torch.onnx.export(model.eval(), model.get_dummy_inputs(), path, opset_version=18, dynamo=dynamo, **names)
            session = onnxruntime.InferenceSession(path)
        states, actions = [np.zeros((L, 1, H), np.float32)] * (len(model.input_names) - 1), []
        for x in alone:
            action, *states = session.run(None, dict(zip(model.input_names, [x.numpy(), *states])))
            actions.append(torch.from_numpy(action))
        return torch.stack(actions)

    for rnn_type in ("lstm", "gru"):
        example = TensorDict({"policy": obs[0]}, [N])
        sizes = {"rnn_type": rnn_type, "rnn_hidden_dim": H, "rnn_num_layers": L}
        model = RNNModel(example, {"actor": ["policy"]}, "actor", 2, [6], **sizes)
        ours = compare.runs(model, rollout)
        compare.runs(model, update)
        with torch.no_grad():
            actions, _ = rollout(model, alone)
            for exported in (ours.as_jit(), torch.jit.script(ours.as_jit())):
                for _ in range(2):
                    exported.reset()
                    compare.same(torch.stack([exported(x) for x in alone]), actions)
        for dynamo in (True, False):  # rsl-rl leaves the choice of the exporter to torch's default
            compare.same(in_onnxruntime(ours.as_onnx(), dynamo), actions)


@client("transformers")
def transformers(compare: Comparison) -> None:
    """EncodecModel: encoder, decoder, its weights' initialisation, save_pretrained and from_pretrained"""
    from transformers import EncodecConfig, EncodecModel

    config = EncodecConfig(
        num_filters=2, num_residual_layers=1, upsampling_ratios=[2, 2], hidden_size=8, codebook_dim=8, codebook_size=16
    )
    model = EncodecModel(config)
    audio = torch.randn(2, 1, 40)

    def run(model):
        embeddings = model.encoder(audio)
        return embeddings, model.decoder(embeddings)

    ours = compare.runs(model, run)
    layers = [m for m in ours.modules() if isinstance(m, nn.LSTM)]
    assert len(layers) == 2
    for each in (ours, model):
        for module in each.modules():
            module._is_hf_initialized = False
        torch.manual_seed(2)
        each.initialize_weights()
    compare.same(ours.state_dict(), model.state_dict())
    assert not any(layer.bias_ih_l0.any() for layer in layers)  # the branch of torch.nn.LSTM; by itself it has biases
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        loaded = EncodecModel.from_pretrained(folder)
    compare.same(loaded.state_dict(), model.state_dict())
    compare.runs(loaded, run)


class Classifier(nn.Module):
    """Of a whole sequence. Not local to its client: opacus pickles it."""

    def __init__(self, cls):
        super().__init__()
        self.rnn, self.head = cls(3, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Scaled(Classifier):
    """Has a Parameter of its own, so that opacus takes it as a whole through functorch, with the layer in it."""

    def __init__(self, cls):
        super().__init__(cls)
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return super().forward(x) * self.scale


class Step(nn.Module):
    """One step of a cell."""

    def __init__(self, cls):
        super().__init__()
        self.cell, self.head = cls(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.cell(x[:, 0]))


@client("opacus")
def opacus(compare: Comparison) -> None:
    """ModuleValidator.validate, fix; GradSampleModule over what fix made, and by functorch over cells and layers"""
    from opacus import GradSampleModule, PrivacyEngine
    from opacus.layers import DPGRU, DPLSTM
    from opacus.validators import ModuleValidator

    N = 4
    x = torch.randn(N, 5, 3)

    def per_sample(model, **options):
        # Opacus leaves hooks and attributes behind in what it is given.
        model = GradSampleModule(copy.deepcopy(model), loss_reduction="sum", **options)
        model(x).square().sum().backward()
        return {name.removeprefix("_module."): p.grad_sample for name, p in model.named_parameters()}

    def row_by_row(model):
        grads = [torch.autograd.grad(model(row[None]).square().sum(), list(model.parameters())) for row in x]
        return {name: torch.stack(of) for (name, _), of in zip(model.named_parameters(), zip(*grads))}

    for cls, dp in ((nn.LSTM, DPLSTM), (nn.GRU, DPGRU)):
        model = Classifier(cls)
        ours = compare.runs(model, lambda model: model(x))
        errors, expected = ModuleValidator.validate(ours), ModuleValidator.validate(model)
        assert [repr(error) for error in errors] == [repr(error) for error in expected] and len(errors) == 1
        fixed = ModuleValidator.fix_and_validate(ours)
        assert type(fixed.rnn) is dp and isinstance(ours.rnn, cls)
        compare.same(per_sample(fixed), per_sample(ModuleValidator.fix(model)))
        grads = {re.sub(r"rnn\.(l\d)\.(.h)\.(\w+)", r"rnn.\3_\2_\1", k): grad for k, grad in per_sample(fixed).items()}
        expected = row_by_row(ours)
        compare.same({name: grads[name] for name in expected}, expected)

    models = [Step(cls) for cls in (nn.RNNCell, nn.GRUCell)] + [Scaled(cls) for cls in (nn.LSTM, nn.GRU, nn.RNN)]
    for model in models:  # of torch.nn's classes, vmap takes LSTM alone
        for options in ({}, {"force_functorch": True}):
            compare.same(per_sample(converted(model), **options), row_by_row(model))
    compare.same(per_sample(converted(models[2])), per_sample(models[2]))

    def private_steps(model):
        model = ModuleValidator.fix(model)
        data = torch.utils.data.TensorDataset(x)
        model, optimizer, loader = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), 0.1),
            data_loader=torch.utils.data.DataLoader(data, batch_size=N),
            noise_multiplier=0.0,
            max_grad_norm=0.5,
            poisson_sampling=False,
        )
        for _ in range(3):
            for (batch,) in loader:
                optimizer.zero_grad()
                model(batch).square().mean().backward()
                optimizer.step()
        return model.state_dict()

    model = Classifier(nn.LSTM)
    compare.same(private_steps(converted(model)), private_steps(model))


@client("stanza")
def stanza(compare: Comparison) -> None:
    """Tokenizer, CharacterModel, CharacterLanguageModel, HighwayLSTM, LSTMAttention, LangIDBiLSTM"""
    from stanza.models.common.char_model import CharacterLanguageModel, CharacterModel
    from stanza.models.common.hlstm import HighwayLSTM
    from stanza.models.common.seq2seq_modules import LSTMAttention
    from stanza.models.common.vocab import CharVocab
    from stanza.models.langid.model import LangIDBiLSTM
    from stanza.models.tokenization.model import Tokenizer

    vocab = {"char": CharVocab([list("abcdefgh \n")])}
    sentences = [["abc", "de"], ["fgh", "abba", "bead", "a"]]
    ids = torch.tensor([[3, 4, 5, 6, 7], [8, 3, 4, 0, 0], [5, 6, 0, 0, 0]])
    lengths = [5, 3, 2]
    for rec_dropout in (0, 0.2):  # the latter makes stanza's own loop over LSTMCells
        args = {
            "char_emb_dim": 4, "char_hidden_dim": 5, "char_num_layers": 2, "char_rec_dropout": rec_dropout,
            "char_dropout": 0.1, "dropout": 0.1,
        }  # fmt: skip
        model = CharacterModel(args, vocab, bidirectional=True).double().eval()
        compare.runs(model, lambda model: model(ids, None, [2, 0, 1], [2, 1], lengths))
        model = CharacterLanguageModel(args, vocab).double()
        model.eval()
        ours = compare.runs(model, lambda model: model(ids, lengths))
        compare.same(ours.build_char_representation(sentences), model.build_char_representation(sentences))
        with tempfile.TemporaryDirectory() as folder:
            ours.float().save(os.path.join(folder, "charlm.pt"))
            loaded = CharacterLanguageModel.load(os.path.join(folder, "charlm.pt"))
        compare.same(ours.per_char_representation(sentences[1]), loaded.per_char_representation(sentences[1]))

        model = HighwayLSTM(4, 5, 2, batch_first=True, bidirectional=True, rec_dropout=rec_dropout, pad=True).double()
        words = torch.randn(3, 5, 4, dtype=torch.float64)
        compare.runs(model, lambda model, words=words: model(words, lengths))

    args = {
        "feat_dim": 2, "rnn_layers": 2, "conv_res": "3", "use_mwt": True, "hierarchical": True, "hier_invtemp": 0.5,
        "tok_noise": 0.1,
    }  # fmt: skip
    model = Tokenizer(args, 10, 4, 5, dropout=0.2, feat_dropout=0.1).double()
    feats = torch.randn(3, 5, 2, dtype=torch.float64)
    compare.runs(model, lambda model: model(ids, feats, lengths))

    model = LSTMAttention(4, 5).double()
    states = torch.randn(2, 3, 5, dtype=torch.float64)
    compare.runs(model, lambda model: model(words, tuple(states), words.new_ones(3, 6, 5)))
    characters = {"<PAD>": 0} | {c: i for i, c in enumerate("abcdefghi", 1)}
    model = LangIDBiLSTM(characters, {"en": 0, "fr": 1}, 2, 4, 5).double()
    compare.runs(model, lambda model: model(ids))


@client("torch_geometric")
def torch_geometric(compare: Comparison) -> None:
    """LSTMAggregation, GRUAggregation, eager and scripted; SAGEConv over an LSTM, GatedGraphConv, Set2Set"""
    from torch_geometric.nn import GatedGraphConv, SAGEConv
    from torch_geometric.nn.aggr import GRUAggregation, LSTMAggregation, Set2Set

    x = torch.randn(7, 4, dtype=torch.float64)
    index = torch.tensor([0, 0, 0, 1, 3, 3, 3])
    edges = torch.tensor([[1, 2, 3, 0, 5, 6, 1], [0, 0, 1, 2, 4, 4, 6]])
    for aggregation in (LSTMAggregation(4, 5, num_layers=2, bidirectional=True), GRUAggregation(4, 5)):
        model = aggregation.double()
        ours = compare.runs(model, lambda model: model(x, index))
        scripted = torch.jit.script(ours)
        compare.same(
            outputs_and_gradients(scripted, lambda model: model(x, index)),
            outputs_and_gradients(torch.jit.script(model), lambda model: model(x, index)),
        )
        compare.same(scripted(x, index), ours(x, index))
    compare.runs(SAGEConv(4, 5, aggr="lstm").double(), lambda model: model(x, edges))
    compare.runs(GatedGraphConv(5, 3).double(), lambda model: model(x, edges))
    compare.runs(Set2Set(4, 3).double(), lambda model: model(x, index))


@client("sb3-contrib")
def sb3_contrib(compare: Comparison) -> None:
    """RecurrentPPO on CartPole: evaluate_actions; two rollouts and updates, the policy converted after construction"""
    from sb3_contrib import RecurrentPPO
    from sb3_contrib.common.recurrent.type_aliases import RNNStates
    from stable_baselines3.common.callbacks import BaseCallback

    class Actions(BaseCallback):
        def __init__(self):
            super().__init__()
            self.taken = []

        def _on_step(self):
            self.taken.append(self.locals["actions"].tolist())
            return True

    def build():
        policy = {"lstm_hidden_size": 8, "net_arch": [8]}
        options = {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "seed": 3, "device": "cpu"}
        return RecurrentPPO("MlpLstmPolicy", "CartPole-v1", policy_kwargs=policy, **options)

    def learn(algorithm):
        actions = Actions()
        algorithm.set_random_seed(3)
        algorithm.learn(64, callback=actions)
        observation = algorithm.get_env().reset()
        action, state = algorithm.predict(observation, deterministic=True)
        again, state = algorithm.predict(observation, state, episode_start=[False], deterministic=True)
        return actions.taken, dict(algorithm.policy.state_dict()), action.tolist(), again.tolist(), state

    def evaluate(policy):
        sequences, T = 3, 4
        state = torch.ones(1, sequences, 8), torch.ones(1, sequences, 8)
        begins = torch.arange(sequences * T) % 5 == 2
        actions = torch.arange(sequences * T) % 2
        return policy.evaluate_actions(observations, actions, RNNStates(state, state), begins.float())

    observations = torch.randn(12, 4)
    theirs, ours = build(), build()
    compare.runs(theirs.policy, evaluate)
    rnnfast.convert(ours.policy)
    assert_converted(ours.policy, theirs.policy)
    results = learn(ours)
    compare.same(results, learn(theirs))
    with tempfile.TemporaryDirectory() as folder:
        ours.save(os.path.join(folder, "policy"))
        loaded = RecurrentPPO.load(os.path.join(folder, "policy"), device="cpu")
    compare.same(dict(loaded.policy.state_dict()), results[1])


@client("neuralforecast")
def neuralforecast(compare: Comparison) -> None:
    """LSTM (direct and recurrent), GRU, DeepAR and DilatedRNN: fit and predict AirPassengers"""
    from neuralforecast import NeuralForecast
    from neuralforecast.losses.pytorch import DistributionLoss
    from neuralforecast.models import GRU, LSTM, DeepAR, DilatedRNN
    from neuralforecast.utils import AirPassengersDF

    options = {
        "h": 4, "input_size": 12, "max_steps": 4, "batch_size": 1, "windows_batch_size": 8, "scaler_type": "standard",
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False,
    }  # fmt: skip
    encoder = {"encoder_hidden_size": 6, "encoder_n_layers": 2, "decoder_hidden_size": 6}
    distribution = DistributionLoss("Normal", level=[80], return_params=True)

    def forecast(models):
        torch.manual_seed(4)
        forecaster = NeuralForecast(models, freq="ME")
        forecaster.fit(AirPassengersDF)
        forecasts = forecaster.predict().drop(columns=["unique_id", "ds"])
        return {column: forecasts[column].to_numpy() for column in forecasts}, [
            dict(model.state_dict()) for model in forecaster.models
        ]

    models = [
        LSTM(**options, **encoder),
        LSTM(**options, **encoder, recurrent=True, alias="recurrent"),
        GRU(**options, **encoder),
        DeepAR(**options, lstm_hidden_size=6, lstm_n_layers=2, trajectory_samples=3, loss=distribution),
        DilatedRNN(**options, cell_type="GRU", encoder_hidden_size=6, dilations=[[1, 2]], decoder_hidden_size=6),
    ]
    compare.same(forecast([converted(model) for model in models]), forecast(models))


@client("thop")
def thop(compare: Comparison) -> None:
    """profile, which looks modules up by type(m): operations and parameters of every layer and cell"""
    from thop import clever_format, profile

    class Cell(nn.Module):
        def __init__(self, cls):
            super().__init__()
            self.cell = cls(4, 5)

        def forward(self, x):
            return self.cell(x[0])

    x = torch.randn(6, 3, 4)
    layers = [cls(4, 5, num_layers=2, bidirectional=True) for cls in (nn.RNN, nn.LSTM, nn.GRU)]
    for model in (*layers, *(Cell(cls) for cls in (nn.RNNCell, nn.LSTMCell, nn.GRUCell))):
        model = nn.Sequential(model)
        ours = compare.runs(model, lambda model: model(x))
        counts = profile(model, (x,), verbose=False, ret_layer_info=True)
        assert counts[0] > 0
        compare.same(profile(ours, (x,), verbose=False, ret_layer_info=True), counts)
        compare.same(clever_format(counts[:2]), clever_format(profile(ours, (x,), verbose=False)))


@client("darts")
def darts(compare: Comparison) -> None:
    """BlockRNNModel, RNNModel (with a likelihood): fit, convert, fit on, predict and backtest"""
    from darts import TimeSeries
    from darts.models import BlockRNNModel, RNNModel
    from darts.utils.likelihood_models import GaussianLikelihood

    series = TimeSeries.from_values(np.sin(np.arange(48) / 3) + np.arange(48) / 50)
    trainer = {
        "accelerator": "cpu", "enable_progress_bar": False, "logger": False, "enable_model_summary": False,
    }  # fmt: skip
    options = {"input_chunk_length": 8, "n_epochs": 1, "batch_size": 8, "random_state": 5, "pl_trainer_kwargs": trainer}

    def go_on(model):
        model.fit(series, epochs=2)
        backtest = model.historical_forecasts(series, start=0.8, retrain=False, forecast_horizon=3)
        return model.predict(6).values(), backtest.values(), dict(model.model.state_dict())

    def build():  # twice, as a copy of a model of darts is not fitted
        return (
            BlockRNNModel(output_chunk_length=3, model="GRU", hidden_dim=6, n_rnn_layers=2, **options),
            BlockRNNModel(output_chunk_length=3, model="LSTM", hidden_dim=6, **options),
            RNNModel(model="LSTM", hidden_dim=6, training_length=12, likelihood=GaussianLikelihood(), **options),
            RNNModel(model="RNN", hidden_dim=6, training_length=12, **options),
        )

    for ours, theirs in zip(build(), build()):
        ours.fit(series)
        theirs.fit(series)
        rnnfast.convert(ours.model)
        assert_converted(ours.model, theirs.model)
        compare.same(go_on(ours), go_on(theirs))


def layers_of_torch(**options: Any) -> list[nn.Module]:
    return [getattr(nn, name)(4, 5, bidirectional=True, **options).eval() for name in ("LSTM", "GRU", "RNN")]


@client("openvino")
def openvino(compare: Comparison) -> None:
    """convert_model of every layer, run for two lengths"""
    import openvino as ov

    for theirs in layers_of_torch():
        ours = converted(theirs)
        compiled = ov.compile_model(ov.convert_model(ours, example_input=torch.randn(7, 3, 4)), "CPU")
        for steps in (7, 9):
            x = torch.randn(steps, 3, 4)
            with torch.no_grad():
                compare.same(list(compiled(x.numpy()).to_tuple()), pytree.tree_leaves(theirs(x)))


@client("tensorboard")
def tensorboard(compare: Comparison) -> None:
    """add_graph of every layer"""
    from torch.utils.tensorboard import SummaryWriter

    for theirs in layers_of_torch():
        with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
            ours, x = converted(theirs), torch.randn(7, 3, 4)
            writer.add_graph(ours, x)
            compare.same(ours(x), theirs(x))


@client("torchviz")
def torchviz(compare: Comparison) -> None:
    """make_dot with saved tensors and attributes, of every layer"""
    from torchviz import make_dot

    for theirs in layers_of_torch():
        x = torch.randn(7, 3, 4)
        ours = compare.runs(theirs, lambda model, x=x: model(x))
        assert "_Layer" in make_dot(ours(x)[0], show_saved=True, show_attrs=True).source


def main(names: list[str]) -> int:
    if unknown := set(names) - set(CLIENTS):
        print(f"no clients: {', '.join(sorted(unknown))}; there are {', '.join(CLIENTS)}")
        return 2
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    failed = False
    print(f"torch {torch.__version__}, rnnfast {Path(rnnfast.__file__).parent}")
    for name in names or CLIENTS:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            print(f"{name:16} not installed")
            continue
        compare, result, error = Comparison(), "ok", ""
        torch.manual_seed(0)
        rnn = mock.patch.object(functional, "rnn", wraps=functional.rnn)
        cell = mock.patch.object(functional, "cell", wraps=functional.cell)
        quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())  # progress bars
        with quiet[0], quiet[1], rnn as layers, cell as cells:
            try:
                CLIENTS[name](compare)
                assert layers.called or cells.called, "no layer of ours ran"
            except Exception:
                failed, result, error = True, "FAILED", traceback.format_exc()
        print(f"{name:16} {version:17} {compare.largest:.1e} {result:6} {CLIENTS[name].__doc__}", flush=True)
        if error:
            print(error, file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
