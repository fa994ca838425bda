"use strict";
// Shows the values of all curves where the pointer (or a finger) is.
for (const chart of document.querySelectorAll(".chart")) {
  const svg = chart.querySelector("svg");
  const curves = [...svg.querySelectorAll(".curve")].map((curve) => ({
    name: curve.dataset.name,
    points: curve.dataset.points.split(" ").map((point) => point.split(",").map(Number)),
  }));
  let tip = null;
  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const nearest = curves.map(({ name, points }) => {
      const point = points.reduce((best, p) => (Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best));
      return { name, samples: point[1], value: point[2] };
    });
    if (!tip) {
      tip = document.createElement("div");
      tip.className = "tip";
      chart.append(tip);
    }
    tip.textContent = nearest
      .map(({ name, samples, value }) => `${name}: ${value} at ${samples.toLocaleString("en")}`)
      .join("\n");
    const left = event.clientX - chart.getBoundingClientRect().left;
    tip.style.left = `${Math.min(left + 12, Math.max(0, chart.clientWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${event.clientY - chart.getBoundingClientRect().top + 16}px`;
  };
  const hide = () => {
    if (tip) tip.remove();
    tip = null;
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}
