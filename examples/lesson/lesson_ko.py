# %% [markdown]
# # 학습 루프 한 줄씩 뜯어보기
#
# PyTorch로 쓴 프로그램은 거의 모두 다음 세 줄을 되풀이합니다.
#
# ```python
# optimizer.zero_grad()
# loss.backward()
# optimizer.step()
# ```
#
# 이 수업에서는 이 세 줄을 하나씩 뜯어봅니다. 기울기가 무엇이고 왜 지워야 하는지 알아본 다음, 선형
# 회귀를 직접 구현하고, 학습률을 골라 보고, 같은 모델을 `nn.Module`로 다시 씁니다. 그러고 나서
# 옵티마이저를 Adam과 RMSprop으로 바꿔 봅니다.
#
# 옵티마이저는 fastsgd의 것을 씁니다. 사용법이 `torch.optim`과 똑같으므로 여기서 배우는 내용은
# `torch.optim`에서도 그대로 통합니다. 마지막 절만 빼면 `fastsgd.SGD`라고 쓴 자리는 어디든
# `torch.optim.SGD`로 바꿔도 됩니다. 정말 그런지는 4절에서 확인합니다.
#
# 준비물은 `torch`, `fastsgd`, `matplotlib`입니다. GPU는 없어도 됩니다. 그래프에 들어가는 글자는
# 한글 글꼴이 없는 컴퓨터에서도 깨지지 않도록 영어로 적었습니다.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.functional import mse_loss

import fastsgd

# %% [markdown]
# ## 1. 기울기는 내리막을 알려 줍니다
#
# 비용 $(w - 3)^2$을 가장 작게 만드는 수 $w$를 찾아봅시다. 답이 3이라는 것은 우리 눈에는 뻔하지만
# 컴퓨터에게는 보이지 않습니다. 그래도 컴퓨터는 지금 서 있는 자리에서 이렇게 물어볼 수 있습니다.
# "여기서 $w$를 조금 늘리면 비용은 그 몇 배만큼 늘어날까?" 그 답이 바로 **기울기**(gradient)입니다.
# 손으로 미분하면 $2(w - 3)$이므로 $w = 1$에서는 $-4$입니다. 기울기가 음수이니 $w$를 늘리면 비용이
# 줄어듭니다.
#
# 이 계산은 PyTorch가 대신해 줍니다. `requires_grad=True`는 이 텐서에 대한 기울기가 필요하다는
# 표시입니다. `backward()`를 부르면 기울기가 계산되어 `.grad`에 저장됩니다.

# %%
w = torch.tensor(1.0, requires_grad=True)
cost = (w - 3) ** 2
cost.backward()
print(f"w = {w.item():.4g}, 비용 = {cost.item():.4g}, w.grad = {w.grad.item():.4g}")

# %% [markdown]
# **경사 하강법**(gradient descent)은 기울기의 반대 방향, 곧 내리막 쪽으로 조금 움직이는 방법입니다.
#
# $$w \leftarrow w - \text{lr} \cdot \frac{\partial\,\text{cost}}{\partial w}$$
#
# 얼마나 움직일지는 학습률(learning rate) `lr`이 정합니다. 옵티마이저는 학습할 텐서들을 맡아
# 두었다가 `step()`을 부를 때마다 하나하나 이 식대로 갱신합니다. 여기서는
# $1 - 0.1 \cdot (-4) = 1.4$가 됩니다.

# %%
optimizer = fastsgd.SGD([w], lr=0.1)
optimizer.step()
print(f"w = {w.item():.4g}, 비용 = {((w - 3) ** 2).item():.4g}")

# %% [markdown]
# ## 2. 기울기는 지우지 않으면 쌓입니다
#
# `backward()`는 `.grad`에 기울기를 덮어쓰지 않습니다. 이미 있던 값에 **더합니다**. 같은 자리에서 세
# 번 불러 봅시다.

# %%
w = torch.tensor(1.0, requires_grad=True)
for turn in range(1, 4):
    cost = (w - 3) ** 2
    cost.backward()
    print(f"backward {turn}번째: w.grad = {w.grad.item():.4g}")

# %% [markdown]
# `w`가 움직이지 않았으니 기울기는 매번 -4입니다. 그런데 `.grad`에는 그 합이 들어 있습니다.
#
# 이것은 일부러 그렇게 만든 것입니다. 메모리에 다 올릴 수 없을 만큼 큰 배치라면, 몇 조각으로 나누어
# 조각마다 `backward()`를 부르고 `step()`은 마지막에 한 번만 부르면 됩니다. 하지만 이번 차례의
# 기울기만 쓰려면 지난번 기울기를 먼저 지워야 합니다. 그 일을 `zero_grad()`가 합니다.

# %%
optimizer = fastsgd.SGD([w], lr=0.1)
optimizer.zero_grad()
print(f"zero_grad 뒤: w.grad = {w.grad}")
cost = (w - 3) ** 2
cost.backward()
print(f"backward 한 번 뒤: w.grad = {w.grad.item():.4g}")


# %% [markdown]
# 깜빡 잊고 지우지 않으면 어떻게 될까요? `zero_grad()`가 있을 때와 없을 때를 나란히 돌려 봅시다.


# %%
def descend(clear):
    """40번 갱신하면서 w가 지나간 자리를 처음부터 끝까지 돌려줍니다."""
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
    print(f"갱신 {turn:2}번 뒤: w = {cleared[turn]:.4f}, zero_grad를 잊으면 {forgotten[turn]:.4f}")

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
# `zero_grad()`가 있으면 `w`는 3으로 다가가 그 자리에 머무릅니다. 없어도 첫걸음은 똑같아서 처음에는
# 잘못된 줄 모릅니다. 그러나 두 번째 걸음부터는 지난 기울기를 모두 짊어지고 가기 때문에, `w`는
# 전속력으로 3을 지나쳐 버리고, 반대편 기울기가 그만큼 쌓인 뒤에야 돌아섭니다. 마찰 없는 그릇 속의
# 구슬처럼 끝없이 왔다 갔다 하는 것입니다. 이때 PyTorch는 아무런 오류도 내지 않습니다. 손실이
# 오르락내리락하며 가라앉지 않는다면 `zero_grad()`부터 확인합시다.

# %% [markdown]
# ## 3. 선형 회귀 직접 구현하기
#
# 택시로 1, 2, 3, 4 km를 갔더니 요금이 각각 5, 7, 9, 11천 원 나왔습니다. 1 km에 얼마이고, 기본요금은
# 얼마일까요? 모델은 직선 하나입니다.
#
# $$\hat{y} = W x + b$$
#
# 가중치(weight) $W$와 편향(bias) $b$가 학습할 파라미터입니다. 눈치챘겠지만 답은 $W = 2$,
# $b = 3$입니다. 답을 알고 있으니 학습이 제대로 되었는지 바로 확인할 수 있습니다.

# %%
x = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
y = torch.tensor([[5.0], [7.0], [9.0], [11.0]])

# %% [markdown]
# 모델은 아직 아무것도 모릅니다. 0에서 출발합시다.

# %%
W = torch.zeros(1, requires_grad=True)
b = torch.zeros(1, requires_grad=True)
optimizer = fastsgd.SGD([W, b], lr=0.05)

# %% [markdown]
# 얼마나 틀렸을까요? 그것을 수 하나로 나타낸 것이 **손실**(loss)입니다. 여기서는 오차를 제곱해서
# 평균한 값, 곧 평균 제곱 오차(MSE)를 씁니다.
#
# $$\text{loss} = \frac{1}{n} \sum_{i=1}^{n} (\hat{y}_i - y_i)^2$$

# %%
prediction = x * W + b
loss = ((prediction - y) ** 2).mean()
print(f"손실 = {loss.item():.4g}")

# %% [markdown]
# 내리막은 어느 쪽일까요? `backward()`를 한 번 부르면 두 파라미터의 기울기가 한꺼번에 나옵니다.

# %%
optimizer.zero_grad()
loss.backward()
print(f"W.grad = {W.grad.item():.4g}, b.grad = {b.grad.item():.4g}")

# %% [markdown]
# 두 기울기가 모두 음수이므로 두 파라미터 모두 커져야 합니다. $W$는 $0 - 0.05 \cdot (-45) = 2.25$,
# $b$는 $0 - 0.05 \cdot (-16) = 0.8$이 됩니다.

# %%
optimizer.step()
print(f"W = {W.item():.4g}, b = {b.item():.4g}")

# %% [markdown]
# 여기까지가 루프 한 바퀴입니다. 데이터 전체를 한 번 학습하는 것을 **에포크**(epoch)라고 합니다.
# 이제 1000 에포크를 돌려 봅시다. 방금 직접 쓴 손실은 PyTorch에 `mse_loss`라는 이름으로 이미 들어
# 있습니다.

# %%
W = torch.zeros(1, requires_grad=True)
b = torch.zeros(1, requires_grad=True)
optimizer = fastsgd.SGD([W, b], lr=0.05)
losses = []
for epoch in range(1, 1001):
    loss = mse_loss(x * W + b, y)  # 얼마나 틀렸는지 구하기
    optimizer.zero_grad()  # 지난 에포크의 기울기 지우기
    loss.backward()  # 손실이 커지는 방향 구하기
    optimizer.step()  # 그 반대 방향으로 파라미터를 조금 옮기기
    losses.append(loss.item())
    if epoch in (1, 2, 5, 10, 100, 1000):
        print(f"에포크 {epoch:4}: 손실 = {losses[-1]:.3g}, W = {W.item():.4f}, b = {b.item():.4f}")

# %%
plt.figure()
plt.semilogy(losses)
plt.xlabel("epoch")
plt.ylabel("loss")
plt.show()

# %% [markdown]
# 손실은 처음에 뚝 떨어지고, 그다음부터는 고르게 줄어듭니다. 세로축이 로그 눈금이므로 직선은
# 에포크마다 같은 비율로 줄어든다는 뜻입니다. 오른쪽 끝에서는 더 내려가지 않는데, 오차가 float32로
# 구별할 수 있는 한계까지 작아졌기 때문입니다.


# %% [markdown]
# ## 4. 비트 하나까지 똑같은 손실
#
# 이 루프는 앞으로도 계속 쓸 테니 함수로 만들어 둡시다. 이 함수는 모델이 무엇인지, 옵티마이저가
# 무엇인지 따지지 않습니다.


# %%
def train(model, x, y, optimizer, epochs):
    """학습하고 에포크별 손실을 돌려줍니다."""
    losses = []
    for _ in range(epochs):
        loss = mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_by_hand(optimizer_class, lr, epochs):
    """직선을 0에서부터 학습하고 손실을 돌려줍니다."""
    W = torch.zeros(1, requires_grad=True)
    b = torch.zeros(1, requires_grad=True)
    return train(lambda x: x * W + b, x, y, optimizer_class([W, b], lr=lr), epochs)


# %% [markdown]
# `fastsgd.SGD`는 `torch.optim.SGD`와 같은 결과를 약속합니다. 거의 같은 것이 아니라 똑같습니다. 두
# 손실 리스트를 `==`로 비교하면, 모든 손실이 마지막 비트까지 같아야만 `True`가 나옵니다.

# %%
ours = train_by_hand(fastsgd.SGD, lr=0.05, epochs=1000)
stock = train_by_hand(torch.optim.SGD, lr=0.05, epochs=1000)
print(f"fastsgd.SGD:     {ours[-1].hex()}")
print(f"torch.optim.SGD: {stock[-1].hex()}")
print(f"손실 {len(ours)}개가 모두 같은가: {ours == stock}")

# %% [markdown]
# ## 5. 학습률
#
# 기울기가 방향이라면 학습률은 보폭입니다. 같은 문제를 세 가지 학습률로 풀어 봅시다.

# %%
learning_rates = (0.001, 0.05, 0.13)
losses_of = {lr: train_by_hand(fastsgd.SGD, lr, epochs=50) for lr in learning_rates}
for lr in learning_rates:
    print(f"lr = {lr:5}: 손실 {losses_of[lr][0]:.3g} -> {losses_of[lr][-1]:.3g}")

# %%
plt.figure()
for lr in learning_rates:
    plt.semilogy(losses_of[lr], label=f"lr = {lr}")
plt.xlabel("epoch")
plt.ylabel("loss")
plt.legend()
plt.show()

# %% [markdown]
# * **너무 작을 때**(0.001): 방향은 맞지만 한참 걸립니다.
# * **알맞을 때**(0.05): 손실이 빠르게 줄고, 그 뒤로도 계속 줄어듭니다.
# * **너무 클 때**(0.13): 걸음마다 골짜기 바닥을 뛰어넘어 반대편 더 높은 곳에 떨어집니다. 그곳은
#   기울기가 더 크니 다음 걸음은 더 커집니다. 손실은 줄기는커녕 *커지고*, 마침내 `inf`가 되었다가
#   `nan`이 됩니다. 이것을 **발산**이라고 합니다.
#
# 에포크가 지날수록 손실이 커진다면 학습률을 10분의 1로 줄여 봅시다.

# %% [markdown]
# ## 6. `nn.Module`로 다시 쓰기
#
# 파라미터가 둘뿐이라면 변수 두 개에 담아 두면 됩니다. 하지만 신경망에는 파라미터가 수백 개씩
# 있습니다. `nn.Module`은 파라미터를 스스로 관리합니다. `self`에 넣어 둔 것이라면 모듈 안의 모듈에
# 있는 것까지 모두 찾아 줍니다. `nn.Linear`는 $Wx + b$를 계산하는 모듈로, `weight`와 `bias`를 갖고
# 있으며 초깃값은 작은 난수입니다. 예측값을 어떻게 계산할지는 `forward`에 적고, 부를 때는
# `model(x)`라고 씁니다.


# %%
class LinearRegression(nn.Module):
    """특성마다 가중치가 하나씩 있고 편향이 하나 있는 모델."""

    def __init__(self, features):
        """파라미터를 만듭니다."""
        super().__init__()
        self.linear = nn.Linear(features, 1)

    def forward(self, x):
        """예측합니다."""
        return self.linear(x)


torch.manual_seed(0)
line = LinearRegression(features=1)
for name, parameter in line.named_parameters():
    print(f"{name}: 크기 {tuple(parameter.shape)}, 초깃값 {parameter.item():.4f}")

# %% [markdown]
# 옵티마이저에는 모델이 무엇이든 `model.parameters()`를 넘기면 됩니다. 루프는 아까 만든 것을 그대로
# 씁니다.

# %%
train(line, x, y, fastsgd.SGD(line.parameters(), lr=0.05), epochs=1000)
print(f"가중치 = {line.linear.weight.item():.4f}, 편향 = {line.linear.bias.item():.4f}")

# %% [markdown]
# 모듈은 학습한 값을 모두 이름과 함께 `state_dict()`로 내어 줍니다. `torch.save`로 저장해 두었다가
# 다른 곳에서 불러올 수도 있습니다. 여기서는 새 모델에 그대로 옮겨 봅시다.

# %%
copy = LinearRegression(features=1)
copy.load_state_dict(line.state_dict())
with torch.no_grad():
    print(f"5 km의 요금: {line(torch.tensor([[5.0]])).item():.3f}")
    print(f"5 km의 요금, 옮긴 모델: {copy(torch.tensor([[5.0]])).item():.3f}")

# %% [markdown]
# ## 7. 다중 선형 회귀
#
# 이번 택시 회사는 거리뿐 아니라 차가 막힌 시간과 짐의 개수도 따집니다. 이제 운행 한 건은
# 특성(feature) 세 개로 된 행 하나이고, 요금은 다음과 같습니다.
#
# $$y = 2 \cdot \text{거리(km)} + 0.5 \cdot \text{막힌 시간(분)} + 1 \cdot \text{짐(개)} + 3$$
#
# 행렬을 쓰면 `rides @ W + b` 한 번으로 모든 운행의 요금을 예측할 수 있습니다. (6, 3) 행렬에 (3, 1)
# 행렬을 곱하면 (6, 1) 행렬이 됩니다.

# %%
rides = torch.tensor(
    [
        # 거리(km), 막힌 시간(분), 짐(개)
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
print(f"예측값의 크기: {tuple((rides @ W + b).shape)}")

# %% [markdown]
# 모델에서 바꿀 것은 특성의 개수뿐입니다. `begin`은 어떤 옵티마이저든 똑같은 모델에서 출발하게 해
# 주고, `show`는 학습한 값을 보여 줍니다.


# %%
def begin():
    """특성이 세 개이고 초깃값이 늘 같은 모델을 돌려줍니다."""
    torch.manual_seed(0)
    return LinearRegression(features=3)


def show(name, model, loss):
    """마지막 손실과 모든 파라미터를 출력합니다."""
    numbers = [*model.linear.weight.flatten().tolist(), model.linear.bias.item()]
    print(f"{name:8} 손실 {loss:.1e}, 학습한 값", *(f"{number:.3f}" for number in numbers))


model = begin()
sgd_losses = train(model, rides, prices, fastsgd.SGD(model.parameters(), lr=0.003), epochs=1000)
show("SGD", model, sgd_losses[-1])

# %% [markdown]
# 가중치가 2, 0.5, 1에 가까워지기는 했지만, 1000 에포크가 지나도록 가중치도 편향도 제자리에 이르지
# 못했습니다. 왜 이렇게 느릴까요? 첫 에포크의 기울기를 봅시다.

# %%
model = begin()
mse_loss(model(rides), prices).backward()
print("기울기:", *(f"{g:.1f}" for g in model.linear.weight.grad.flatten().tolist()))

# %% [markdown]
# 막힌 시간은 값이 가장 커서 기울기도 압도적으로 큽니다. 그런데 학습률은 하나뿐입니다. 시간의
# 가중치가 골짜기를 뛰어넘지 않을 만큼 작아야 하는데(0.004만 되어도 발산합니다), 그러면 다른
# 파라미터에는 너무 작습니다.

# %% [markdown]
# ## 8. RMSprop과 Adam
#
# **RMSprop**은 파라미터마다 보폭을 따로 정합니다. 기울기 $g$를 제곱한 값의 이동 평균 $v$를 구해
# 두고, 기울기를 그 제곱근으로 나눕니다.
#
# $$v \leftarrow \alpha v + (1 - \alpha) g^2, \qquad
#   w \leftarrow w - \text{lr} \cdot \frac{g}{\sqrt{v} + \epsilon}$$
#
# **Adam**은 여기서 한 걸음 더 나아가 기울기 자리에도 기울기의 이동 평균 $m$을 씁니다. 그래서
# 기울기가 그때그때 들쭉날쭉해도 가던 방향을 잃지 않습니다.
#
# $$m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
#   v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \qquad
#   w \leftarrow w - \text{lr} \cdot \frac{\hat{m}}{\sqrt{\hat{v}} + \epsilon}$$
#
# $t$번째 갱신에서 $\hat{m} = m / (1 - \beta_1^t)$, $\hat{v} = v / (1 - \beta_2^t)$입니다. 두 이동
# 평균은 0에서 출발하는 탓에 처음에는 너무 작으므로, 이렇게 바로잡아 씁니다. 그래서 Adam의 첫
# 갱신에는 $g / |g|$, 곧 $\pm 1$만 남습니다. 기울기가 크든 작든 모든 파라미터가 똑같이 `lr`만큼
# 움직입니다.

# %%
model = begin()
before = model.linear.weight.detach().clone()
train(model, rides, prices, fastsgd.Adam(model.parameters(), lr=0.1), epochs=1)
moves = (model.linear.weight.detach() - before).flatten().tolist()
print("Adam이 처음 움직인 거리:", *(f"{move:.4f}" for move in moves))

# %% [markdown]
# 루프는 그대로 두고 옵티마이저의 이름과 학습률만 바꿉니다. 학습률까지 바꾸는 것은 그 뜻이 달라졌기
# 때문입니다. SGD에서는 기울기에 곱하는 수였지만, 이 둘에서는 파라미터가 한 번에 움직이는 거리에
# 가깝습니다.

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
# Adam은 네 수를 모두 찾아냅니다. RMSprop은 그 근처까지 가지만, 그 뒤로 손실이 자꾸 튀어 오릅니다.
# 목표 근처에서 $g$는 0으로 가도 $g / \sqrt{v}$는 0으로 가지 않아서, `lr`만 한 보폭으로 목표 둘레를
# 맴돌기 때문입니다. 끝으로 갈수록 학습률을 줄이면 해결됩니다. `torch.optim.lr_scheduler`에 학습률을
# 조금씩 줄이는 방법이 여러 가지 있지만, 여기서는 손으로 한 번 줄이고 이어서 학습해 봅시다.

# %%
optimizer.param_groups[0]["lr"] = 0.0001
more_losses = train(model, rides, prices, optimizer, epochs=1000)
show("RMSprop", model, more_losses[-1])

# %% [markdown]
# 그러면 무엇을 써야 할까요? 이것은 작은 문제 하나의 결과일 뿐, 순위표가 아닙니다. 처음에는 Adam이
# 무난합니다. 하지만 SGD도, 특히 `momentum=0.9`를 주고 학습률을 잘 고르면, 그에 못지않을 때가
# 많습니다.

# %% [markdown]
# ## 9. 더 나아가기: `step()` 한 번에 더 많은 일을
#
# 실제 학습 루프에는 `step()` 앞뒤로 몇 줄이 더 붙습니다. 그중 흔한 것이 **기울기 클리핑**(gradient
# clipping)입니다. 모든 파라미터의 기울기를 한데 모은 길이(노름)가 `max_norm`보다 크면 그 길이에
# 맞추어 줄입니다. 이상한 배치 하나 때문에 모델이 멀리 튕겨 나가는 일을 막으려는 것입니다.


# %%
def train_clipped(model, optimizer, epochs):
    """기울기의 길이를 10 이하로 줄여 학습하고 손실을 돌려줍니다."""
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
print(f"손실 {four_lines[0]:.4g} -> {four_lines[-1]:.4g}")

# %% [markdown]
# 이 줄들은 저마다 모든 기울기를 처음부터 다시 훑습니다. fastsgd의 옵티마이저는 갱신하는 김에 이
# 일까지 해 줍니다. `max_grad_norm`은 클리핑을 하고, `clear_grads`는 갱신이 끝난 뒤 기울기를
# 지웁니다. 클리핑하기 전의 길이는 `optimizer.grad_norm`에 남습니다.

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
        print(f"에포크 {epoch:3}: 기울기의 길이 {optimizer.grad_norm.item():.1f}")
print(f"손실 {two_lines[0]:.4g} -> {two_lines[-1]:.4g}")
print(f"갱신 뒤의 기울기: {model.linear.weight.grad}")

# %% [markdown]
# 두 줄이 줄었지만 손실은 긴 루프와 같습니다. 이런 옵션이 더 있으니 `help(fastsgd.SGD)`에서
# 찾아봅시다.
#
# **직접 해 봅시다.** 3절의 루프에서 `zero_grad()`를 빼 봅시다. 운행 데이터를
# `fastsgd.SGD(..., momentum=0.9)`로 학습해 봅시다. 특성마다 가장 큰 값으로 나눈 다음, SGD의
# 학습률을 얼마까지 올릴 수 있는지 알아봅시다.
