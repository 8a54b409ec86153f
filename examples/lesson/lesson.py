# %% [markdown]
# # A training loop, line by line
#
# Nearly every PyTorch program turns around the same three lines:
#
# ```python
# optimizer.zero_grad()
# loss.backward()
# optimizer.step()
# ```
#
# In this lesson you take them apart. You see what a gradient is and why it has to be cleared, write
# a linear regression by hand, choose a learning rate, write the same model as an `nn.Module`, and
# then exchange the optimizer for Adam and for RMSprop.
#
# The optimizers are fastsgd's. They are used as those of `torch.optim`, so all that you learn here
# holds there too: for `fastsgd.SGD` you could write `torch.optim.SGD` anywhere but in the last
# section. In section 4 you check that.
#
# You need `torch`, `fastsgd` and `matplotlib`; a GPU is not needed.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.functional import mse_loss

import fastsgd

# %% [markdown]
# ## 1. A gradient says which way is down
#
# Let us look for the number $w$ that makes the cost $(w - 3)^2$ as small as possible. We can see
# that it is 3. A program that cannot see it may still ask, wherever it stands: if $w$ grows a
# little, by how many times that does the cost grow? The answer is the **gradient**. On paper it is
# $2(w - 3)$, so at $w = 1$ it is $-4$: the cost falls as $w$ grows.
#
# PyTorch works it out. `requires_grad=True` says for which tensors it is wanted, `backward()` works
# it out, and `.grad` is where it is put.

# %%
w = torch.tensor(1.0, requires_grad=True)
cost = (w - 3) ** 2
cost.backward()
print(f"w = {w.item():.4g}, cost = {cost.item():.4g}, w.grad = {w.grad.item():.4g}")

# %% [markdown]
# **Gradient descent** goes a little way against the gradient, which is downhill:
#
# $$w \leftarrow w - \text{lr} \cdot \frac{\partial\,\text{cost}}{\partial w}$$
#
# How far is up to the learning rate, `lr`. An optimizer holds the tensors to be learned and does
# this with each of them whenever `step()` is called. Here: $1 - 0.1 \cdot (-4) = 1.4$.

# %%
optimizer = fastsgd.SGD([w], lr=0.1)
optimizer.step()
print(f"w = {w.item():.4g}, cost = {((w - 3) ** 2).item():.4g}")

# %% [markdown]
# ## 2. Gradients add up until they are cleared
#
# `backward()` does not write the gradient into `.grad`. It **adds** it to what is there. Call it
# three times, at the same place:

# %%
w = torch.tensor(1.0, requires_grad=True)
for turn in range(1, 4):
    cost = (w - 3) ** 2
    cost.backward()
    print(f"after backward number {turn}: w.grad = {w.grad.item():.4g}")

# %% [markdown]
# The gradient was -4 each time, as `w` has not moved. What `.grad` holds is the sum.
#
# That is meant so: a batch too large for memory can be taken in pieces, with a `backward()` for
# each piece and one `step()` for all of them. But a loop that wants the gradient of this turn alone
# has to clear the old one first. That is what `zero_grad()` is for:

# %%
optimizer = fastsgd.SGD([w], lr=0.1)
optimizer.zero_grad()
print(f"after zero_grad: w.grad = {w.grad}")
cost = (w - 3) ** 2
cost.backward()
print(f"after one backward: w.grad = {w.grad.item():.4g}")


# %% [markdown]
# What happens when it is forgotten? Here is the same descent, with it and without it:


# %%
def descend(clear):
    """Return where w was before each of 40 steps, and after the last."""
    w = torch.tensor(1.0, requires_grad=True)
    optimizer = fastsgd.SGD([w], lr=0.1)
    path = [w.item()]
    for _ in range(40):
        if clear:
            optimizer.zero_grad()
        cost = (w - 3) ** 2
        cost.backward()
        optimizer.step()
        path.append(w.item())
    return path


cleared = descend(clear=True)
forgotten = descend(clear=False)
for turn in (0, 1, 2, 4, 8, 16, 40):
    print(f"step {turn:2}: w = {cleared[turn]:.4f}, zero_grad forgotten: {forgotten[turn]:.4f}")

# %%
plt.figure()
plt.plot(cleared, label="with zero_grad")
plt.plot(forgotten, label="zero_grad forgotten")
plt.axhline(3, color="gray", linewidth=0.8)
plt.xlabel("step")
plt.ylabel("w")
plt.legend()
plt.show()

# %% [markdown]
# With `zero_grad()`, `w` goes to 3 and stays. Without it, the first step is right, and so nothing
# looks wrong at first. But every step after it takes all the old gradients along, so `w` runs past
# 3 with full speed, turns only when the gradients of the other side outweigh them, and swings to
# and fro for ever, like a ball in a bowl without friction. PyTorch raises no error. When a loss
# goes up and down and will not settle, look for the `zero_grad()` first.

# %% [markdown]
# ## 3. Linear regression by hand
#
# Four taxi rides, of 1, 2, 3 and 4 km, cost 5, 7, 9 and 11. What is the price of a kilometre, and
# what does it cost to get in? The model is a straight line,
#
# $$\hat{y} = W x + b,$$
#
# with a weight $W$ and a bias $b$ that are to be learned. You may see the answer already, 2 for
# $W$ and 3 for $b$; so you will know whether the loop has found it.

# %%
x = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
y = torch.tensor([[5.0], [7.0], [9.0], [11.0]])

# %% [markdown]
# The model knows nothing yet, and begins with zeros.

# %%
W = torch.zeros(1, requires_grad=True)
b = torch.zeros(1, requires_grad=True)
optimizer = fastsgd.SGD([W, b], lr=0.05)

# %% [markdown]
# How wrong is it? The **loss** is one number that says so: the mean of the squared errors,
#
# $$\text{loss} = \frac{1}{n} \sum_{i=1}^{n} (\hat{y}_i - y_i)^2.$$

# %%
prediction = x * W + b
loss = ((prediction - y) ** 2).mean()
print(f"loss = {loss.item():.4g}")

# %% [markdown]
# Which way is down? `backward()` asks that of both parameters at once.

# %%
optimizer.zero_grad()
loss.backward()
print(f"W.grad = {W.grad.item():.4g}, b.grad = {b.grad.item():.4g}")

# %% [markdown]
# Both gradients are negative, so both parameters should grow: $W$ to $0 - 0.05 \cdot (-45) = 2.25$
# and $b$ to $0 - 0.05 \cdot (-16) = 0.8$.

# %%
optimizer.step()
print(f"W = {W.item():.4g}, b = {b.item():.4g}")

# %% [markdown]
# This was one turn of the loop. Going once over all the data is called an **epoch**. Let us run
# 1000 of them. `mse_loss` is PyTorch's name for the loss that you have just written out.

# %%
W = torch.zeros(1, requires_grad=True)
b = torch.zeros(1, requires_grad=True)
optimizer = fastsgd.SGD([W, b], lr=0.05)
losses = []
for epoch in range(1, 1001):
    loss = mse_loss(x * W + b, y)  # how wrong?
    optimizer.zero_grad()  # forget the gradients of the epoch before
    loss.backward()  # which way does the loss grow?
    optimizer.step()  # take each parameter a little the other way
    losses.append(loss.item())
    if epoch in (1, 2, 5, 10, 100, 1000):
        print(f"epoch {epoch:4}: loss = {losses[-1]:.3g}, W = {W.item():.4f}, b = {b.item():.4f}")

# %%
plt.figure()
plt.semilogy(losses)
plt.xlabel("epoch")
plt.ylabel("loss")
plt.show()

# %% [markdown]
# The loss falls fast at first and then evenly (the axis is logarithmic: a straight line means the
# same factor in each epoch). Far right it can fall no further, as the errors have become as small
# as float32 can tell apart.


# %% [markdown]
# ## 4. The same losses, bit for bit
#
# The loop will be needed again, so we make it a function. It does not ask what the model is, nor
# the optimizer.


# %%
def train(model, x, y, optimizer, epochs):
    """Train, and return the loss of each epoch."""
    losses = []
    for _ in range(epochs):
        loss = mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_by_hand(optimizer_class, lr, epochs):
    """Train the straight line, from zeros, and return the losses."""
    W = torch.zeros(1, requires_grad=True)
    b = torch.zeros(1, requires_grad=True)
    return train(lambda x: x * W + b, x, y, optimizer_class([W, b], lr=lr), epochs)


# %% [markdown]
# `fastsgd.SGD` promises the results of `torch.optim.SGD`: not nearly the same, the same. `==` on
# two lists of floats is true only if every loss is equal to the last bit.

# %%
ours = train_by_hand(fastsgd.SGD, lr=0.05, epochs=1000)
stock = train_by_hand(torch.optim.SGD, lr=0.05, epochs=1000)
print(f"fastsgd.SGD:     {ours[-1].hex()}")
print(f"torch.optim.SGD: {stock[-1].hex()}")
print(f"all {len(ours)} losses equal: {ours == stock}")

# %% [markdown]
# ## 5. The learning rate
#
# The gradient says which way, and the learning rate how far. Here are three of them on the same
# task:

# %%
learning_rates = (0.001, 0.05, 0.13)
losses_of = {lr: train_by_hand(fastsgd.SGD, lr, epochs=50) for lr in learning_rates}
for lr in learning_rates:
    print(f"lr = {lr:5}: loss {losses_of[lr][0]:.3g} -> {losses_of[lr][-1]:.3g}")

# %%
plt.figure()
for lr in learning_rates:
    plt.semilogy(losses_of[lr], label=f"lr = {lr}")
plt.xlabel("epoch")
plt.ylabel("loss")
plt.legend()
plt.show()

# %% [markdown]
# * **Too small** (0.001): the way is right, but it takes very many steps.
# * **Just right** (0.05): the loss falls fast, and goes on falling.
# * **Too large** (0.13): each step leaps over the bottom of the valley and lands higher up on the
#   other side, where the gradient is larger, so the next leap is longer still. The loss *grows*. In
#   the end it is `inf`, and then `nan`.
#
# When a loss grows from epoch to epoch, try a learning rate ten times smaller.

# %% [markdown]
# ## 6. The same as an `nn.Module`
#
# With two parameters, we can keep them in two variables. A network has hundreds. An `nn.Module`
# keeps its parameters itself: all that is assigned to `self` is found again, in modules within
# modules too. `nn.Linear` is the module of $Wx + b$; it holds `weight` and `bias`, and begins with
# small random numbers. `forward` says how a prediction is made; you call it as `model(x)`.


# %%
class LinearRegression(nn.Module):
    """A weight for each feature, and a bias."""

    def __init__(self, features):
        """Make the parameters."""
        super().__init__()
        self.linear = nn.Linear(features, 1)

    def forward(self, x):
        """Predict."""
        return self.linear(x)


torch.manual_seed(0)
line = LinearRegression(features=1)
for name, parameter in line.named_parameters():
    print(f"{name}: shape {tuple(parameter.shape)}, begins as {parameter.item():.4f}")

# %% [markdown]
# An optimizer takes `model.parameters()`, whatever the model is. The loop is the one that we have.

# %%
train(line, x, y, fastsgd.SGD(line.parameters(), lr=0.05), epochs=1000)
print(f"weight = {line.linear.weight.item():.4f}, bias = {line.linear.bias.item():.4f}")

# %% [markdown]
# A module can also hand out all that it has learned, by name, in its `state_dict()`, to be saved
# with `torch.save` and loaded elsewhere. Another model takes it over:

# %%
copy = LinearRegression(features=1)
copy.load_state_dict(line.state_dict())
with torch.no_grad():
    print(f"5 km: {line(torch.tensor([[5.0]])).item():.3f}")
    print(f"5 km, says the copy: {copy(torch.tensor([[5.0]])).item():.3f}")

# %% [markdown]
# ## 7. Many variables
#
# This taxi company counts more than kilometres: minutes in traffic and pieces of luggage as well.
# Each ride is now a row of three features, and its price is
#
# $$y = 2 \cdot \text{km} + 0.5 \cdot \text{minutes} + 1 \cdot \text{luggage} + 3.$$
#
# In matrices, `rides @ W + b` makes the predictions of all the rides at once: (6, 3) times (3, 1)
# gives (6, 1).

# %%
rides = torch.tensor(
    [
        # km, minutes, pieces of luggage
        [1.0, 4.0, 0.0],
        [2.0, 10.0, 1.0],
        [3.0, 6.0, 2.0],
        [5.0, 20.0, 0.0],
        [6.0, 12.0, 1.0],
        [8.0, 30.0, 2.0],
    ]
)
prices = torch.tensor([[7.0], [13.0], [14.0], [23.0], [22.0], [36.0]])
W = torch.zeros(3, 1, requires_grad=True)
b = torch.zeros(1, requires_grad=True)
print(f"shape of the predictions: {tuple((rides @ W + b).shape)}")

# %% [markdown]
# Of our module, only the number of features changes. `begin` gives every optimizer the same model
# to begin with, and `show` writes what was learned.


# %%
def begin():
    """Return a model of three features, always with the same first numbers."""
    torch.manual_seed(0)
    return LinearRegression(features=3)


def show(name, model, loss):
    """Print the last loss and all parameters."""
    numbers = [*model.linear.weight.flatten().tolist(), model.linear.bias.item()]
    print(f"{name:8} loss {loss:.1e}, learned", *(f"{number:.3f}" for number in numbers))


model = begin()
sgd_losses = train(model, rides, prices, fastsgd.SGD(model.parameters(), lr=0.003), epochs=1000)
show("SGD", model, sgd_losses[-1])

# %% [markdown]
# The weights come near 2, 0.5 and 1, but after 1000 epochs neither they nor the bias are quite
# there. Why so slow? Look at the gradients of the first epoch:

# %%
model = begin()
mse_loss(model(rides), prices).backward()
print("gradients:", *(f"{g:.1f}" for g in model.linear.weight.grad.flatten().tolist()))

# %% [markdown]
# The minutes are the largest numbers, so their gradient is by far the largest. One learning rate
# has to do for all: small enough that the weight of the minutes does not leap over its valley
# (0.004 is already too much), and so too small for the others.

# %% [markdown]
# ## 8. RMSprop and Adam
#
# **RMSprop** gives each parameter a step size of its own. It keeps a running mean $v$ of the
# squares of the gradient $g$, and divides by its root:
#
# $$v \leftarrow \alpha v + (1 - \alpha) g^2, \qquad
#   w \leftarrow w - \text{lr} \cdot \frac{g}{\sqrt{v} + \epsilon}$$
#
# **Adam** does that too, and in place of the gradient takes a running mean $m$ of it, so that it
# keeps its way when single gradients are noisy:
#
# $$m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
#   v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \qquad
#   w \leftarrow w - \text{lr} \cdot \frac{\hat{m}}{\sqrt{\hat{v}} + \epsilon}$$
#
# The hats, $\hat{m} = m / (1 - \beta_1^t)$ and $\hat{v} = v / (1 - \beta_2^t)$ in step $t$, make up
# for both means beginning with 0. In Adam's first step they leave $g / |g|$, which is $\pm 1$:
# every parameter moves by `lr`, however large or small its gradient is.

# %%
model = begin()
before = model.linear.weight.detach().clone()
train(model, rides, prices, fastsgd.Adam(model.parameters(), lr=0.1), epochs=1)
moves = (model.linear.weight.detach() - before).flatten().tolist()
print("Adam's first moves:", *(f"{move:.4f}" for move in moves))

# %% [markdown]
# For the loop nothing changes. A name is exchanged, and the learning rate, because it now has
# another meaning: with SGD it is a factor for the gradient, with these two about how far a
# parameter moves in a step.

# %%
model = begin()
adam_losses = train(model, rides, prices, fastsgd.Adam(model.parameters(), lr=0.1), epochs=1000)
show("Adam", model, adam_losses[-1])

# %%
model = begin()
optimizer = fastsgd.RMSprop(model.parameters(), lr=0.01)
rmsprop_losses = train(model, rides, prices, optimizer, epochs=1000)
show("RMSprop", model, rmsprop_losses[-1])

# %%
plt.figure()
plt.semilogy(sgd_losses, label="SGD, lr = 0.003")
plt.semilogy(adam_losses, label="Adam, lr = 0.1")
plt.semilogy(rmsprop_losses, label="RMSprop, lr = 0.01")
plt.xlabel("epoch")
plt.ylabel("loss")
plt.legend()
plt.show()

# %% [markdown]
# Adam finds all four numbers. RMSprop comes near them, and then its loss leaps up again and again:
# near the goal $g / \sqrt{v}$ does not go to 0 as $g$ does, so it hops about the goal with steps of
# about `lr`. The remedy is a smaller learning rate towards the end; `torch.optim.lr_scheduler` has
# ways to lower it bit by bit. Here we do it once, by hand, and go on:

# %%
optimizer.param_groups[0]["lr"] = 0.0001
more_losses = train(model, rides, prices, optimizer, epochs=1000)
show("RMSprop", model, more_losses[-1])

# %% [markdown]
# Which one to take? This is one small task, and no ranking. Adam is a good first choice; plain SGD,
# mostly with `momentum=0.9`, is often as good once its learning rate is well chosen.

# %% [markdown]
# ## 9. Outlook: more in one step
#
# Longer training loops have more lines around `step()`. A common one is *clipping*: when the
# gradients of all parameters together are longer than `max_norm`, they are scaled down to it, so
# that one strange batch cannot throw the model far off.


# %%
def train_clipped(model, optimizer, epochs):
    """Train with gradients no longer than 10, and return the losses."""
    losses = []
    for _ in range(epochs):
        loss = mse_loss(model(rides), prices)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=10.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


model = begin()
four_lines = train_clipped(model, fastsgd.SGD(model.parameters(), lr=0.003), epochs=200)
print(f"loss {four_lines[0]:.4g} -> {four_lines[-1]:.4g}")

# %% [markdown]
# Each of these lines goes over all gradients again. fastsgd's optimizers can do it on
# the way, while they step: `max_grad_norm` clips, and `clear_grads` clears the gradients
# afterwards. How long they were before clipping is in `optimizer.grad_norm`.

# %%
model = begin()
optimizer = fastsgd.SGD(model.parameters(), lr=0.003, max_grad_norm=10.0, clear_grads=True)
two_lines = []
for epoch in range(1, 201):
    loss = mse_loss(model(rides), prices)
    loss.backward()
    optimizer.step()
    two_lines.append(loss.item())
    if epoch in (1, 2, 50, 200):
        print(f"epoch {epoch:3}: gradient norm {optimizer.grad_norm.item():.1f}")
print(f"loss {two_lines[0]:.4g} -> {two_lines[-1]:.4g}")
print(f"gradient after the step: {model.linear.weight.grad}")

# %% [markdown]
# The losses are those of the longer loop, with two lines less. `help(fastsgd.SGD)` lists the other
# such options.
#
# **Try it yourself.** Take the `zero_grad()` out of the loop of section 3. Train the rides with
# `fastsgd.SGD(..., momentum=0.9)`. Divide each feature by its largest value, and find out how much
# larger the learning rate of SGD may be then.
