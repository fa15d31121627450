"use strict";
const form = document.getElementById("controls");
if (form) {
  const slider = document.getElementById("slider");
  const text = document.getElementById("eps");
  let timer = 0;
  let running = null;
  slider.hidden = false;

  const show = async () => {
    running?.abort();
    running = new AbortController();
    const query = new URLSearchParams(new FormData(form));
    const live = document.getElementById("live");
    live.setAttribute("aria-busy", "true");
    try {
      const answer = await fetch(`${form.action}?${query}`, { signal: running.signal });
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      live.replaceChildren(...page.getElementById("live").childNodes);
      live.removeAttribute("aria-busy");
      history.replaceState(null, "", `${form.action}?${query}`);
    } catch (error) {
      if (error.name !== "AbortError") live.textContent = "The server does not answer.";
    }
  };
  slider.addEventListener("input", () => {
    text.value = slider.value;
    document.getElementById("method").value = "";
    clearTimeout(timer);
    timer = setTimeout(show, 120);
  });
  text.addEventListener("input", () => { if (Number.isFinite(Number(text.value))) slider.value = text.value; });
  form.addEventListener("submit", (event) => { event.preventDefault(); show(); });
}
