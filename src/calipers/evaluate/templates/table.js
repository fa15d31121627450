"use strict";
for (const table of document.querySelectorAll("table[data-sort]")) {
  const heads = [...table.tHead.rows[0].cells];
  const value = (body, place) => {
    const cell = body.rows[0].cells[place];
    return cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v);
  };
  heads.forEach((head, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const falling = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const bodies = [...table.tBodies].sort((a, b) => {
        const [x, y] = [value(a, place), value(b, place)];
        return (x < y ? -1 : x > y ? 1 : 0) * (falling ? -1 : 1);
      });
      table.append(...bodies);
    });
  });
  const choice = document.createElement("p");
  choice.className = "legend";
  for (const [kind, word] of [["unknown", "unknown"], ["broken", "broken"], ["robust", "certified"]]) {
    const box = document.createElement("input");
    box.type = "checkbox";
    box.checked = true;
    box.addEventListener("change", () => {
      for (const body of table.tBodies) if (body.dataset.kind === kind) body.hidden = !box.checked;
    });
    const text = document.createElement("label");
    text.append(box, ` ${word}`);
    choice.append(text);
  }
  table.parentElement.before(choice);
}
