// Filters the pairs of a page: words, who stays, reasons, sources; and sorts by score. Text only ever goes through textContent.
"use strict";
(() => {
  const figures = [...document.querySelectorAll("figure[data-state]")];
  const tools = document.querySelector(".tools");
  if (!tools || !figures.length) return;
  const search = tools.querySelector("input[type=search]");
  const output = tools.querySelector("output");
  const order = tools.querySelector("select[name=order]");
  const text = new Map(figures.map((figure) => [figure, figure.textContent.toLowerCase()]));
  const places = new Map(figures.map((figure, place) => [figure, place]));
  const choices = ["reason", "source", "method"].map((name) => choice(name)).filter(Boolean);
  const states = [...tools.querySelectorAll("input[type=checkbox]")];

  function choice(name) {
    const values = [...new Set(figures.map((figure) => figure.dataset[name]).filter(Boolean))].sort();
    if (values.length < 2) return null;
    const select = document.createElement("select");
    select.setAttribute("aria-label", name);
    for (const value of ["", ...values]) {
      const option = document.createElement("option");
      option.value = value;
      option.textContent = value || `every ${name}`;
      select.append(option);
    }
    tools.insertBefore(select, order ? order.parentElement : output);
    return { name, select };
  }

  function fits(figure) {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const state = states.find((box) => box.value === figure.dataset.state);
    // A choice is about those that have the value: a reason says nothing of pairs that stay.
    return (
      (!state || state.checked) &&
      words.every((word) => text.get(figure).includes(word)) &&
      choices.every(({ name, select }) => !select.value || !figure.dataset[name] || figure.dataset[name] === select.value)
    );
  }

  function show() {
    let shown = 0;
    for (const figure of figures) {
      figure.hidden = !fits(figure);
      shown += figure.hidden ? 0 : 1;
    }
    for (const group of document.querySelectorAll(".group")) group.hidden = !group.querySelector("figure:not([hidden])");
    // A side with nothing to show gives its room to the other.
    const sides = [...document.querySelectorAll(".side")];
    for (const side of sides) side.hidden = !side.querySelector("figure:not([hidden])");
    const used = sides.filter((side) => !side.hidden).length;
    document.querySelector(".sides")?.style.setProperty("--sides", Math.max(1, used));
    output.textContent = `${shown.toLocaleString("en")} of ${figures.length.toLocaleString("en")} shown`;
  }

  function sort() {
    const sign = { rising: 1, falling: -1 }[order.value] || 0;
    const score = (figure) => (figure.dataset.score === undefined ? Infinity : sign * Number(figure.dataset.score));
    for (const sheet of document.querySelectorAll(".sheet")) {
      const inside = [...sheet.children];
      inside.sort((a, b) => (sign && score(a) !== score(b) ? score(a) - score(b) : places.get(a) - places.get(b)));
      sheet.append(...inside);
    }
  }

  tools.addEventListener("input", (event) => {
    if (event.target === order) sort();
    show();
  });
  show();
})();
