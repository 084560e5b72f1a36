// The theme, the copies of tables and listings, figures enlarged, the data as a file. Sorting is sortable.min.js.
"use strict";
(() => {
  const root = document.documentElement;
  const KEY = "lightning-merge-theme";
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const phone = matchMedia("(max-width: 63rem)");

  // A page that is opened as a file may not be allowed to remember anything.
  const remembered = () => { try { return localStorage.getItem(KEY); } catch { return null; } };
  const remember = theme => { try { localStorage.setItem(KEY, theme); } catch { /* until the page is closed */ } };
  const theme = () => root.dataset.theme || (dark.matches ? "dark" : "light");
  if (["light", "dark"].includes(remembered())) root.dataset.theme = remembered();
  root.classList.add("js");

  function nameTheme() {
    const other = theme() === "dark" ? "Light" : "Dark";
    document.getElementById("theme-name").textContent = other;
    document.getElementById("theme").setAttribute("aria-label", `${other} theme`);
  }

  function switchTheme() {
    root.dataset.theme = theme() === "dark" ? "light" : "dark";
    remember(root.dataset.theme);
    nameTheme();
  }

  function say(sentence) {
    const status = document.getElementById("status");
    status.textContent = "";
    clearTimeout(say.timer);
    requestAnimationFrame(() => { status.textContent = sentence; });
    say.timer = setTimeout(() => { status.textContent = ""; }, 4000);
  }

  async function copy(text, what) {
    let copied = true;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const focused = document.activeElement;
      const area = document.body.appendChild(document.createElement("textarea"));
      area.className = "unseen";
      area.value = text;
      area.select();
      copied = document.execCommand("copy");
      area.remove();
      focused.focus();
    }
    say(copied ? `${what} copied` : `${what} could not be copied: the browser does not allow it`);
  }

  // A table in the order that is shown; each line was written by the program that made the page.
  function copyTable(button) {
    const { table, copies } = partsOf(button);
    const { before, rows, after } = JSON.parse(copies.textContent)[button.dataset.format];
    const shown = [...table.tBodies[0].rows].map(row => rows[row.dataset.row]);
    copy([...before, ...shown, ...after].join("\n"), button.dataset.format);
  }

  function partsOf(element) {
    const part = element.closest(".table");
    return { table: part.querySelector("table"), copies: part.querySelector(".copies"), unsort: part.querySelector(".unsort") };
  }

  function unsort(button) {
    const { table } = partsOf(button);
    table.querySelectorAll("thead th").forEach(th => th.removeAttribute("aria-sort"));
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => a.dataset.row - b.dataset.row));
    table.querySelector("thead button").focus();
    button.hidden = true;
    say("Original order");
  }

  // Numbers start with the greatest, text with A: sortable.min.js turns the direction that it finds.
  function startWithA(th) {
    if (th.classList.contains("text") && !th.hasAttribute("aria-sort")) th.setAttribute("aria-sort", "descending");
  }

  function enlarge(button) {
    const place = button.closest("figure").querySelector(".plot");
    const dialog = document.getElementById("enlarged");
    const image = dialog.appendChild(document.createElement("div"));
    image.className = "plot";
    image.tabIndex = 0;
    image.setAttribute("role", "region");
    image.setAttribute("aria-label", "Figure");
    place.style.minHeight = `${place.offsetHeight}px`;
    image.append(...place.childNodes);
    dialog.addEventListener("close", () => {
      place.append(...image.childNodes);
      place.style.minHeight = "";
      image.remove();
    }, { once: true });
    dialog.showModal();
  }

  // What fits needs no scrolling, hence no stop for the keyboard, and its header may stay in sight.
  function fit(region) {
    const fits = region.querySelector("table").offsetWidth <= region.clientWidth;
    region.classList.toggle("fits", fits);
    if (fits) region.removeAttribute("tabindex");
    else region.tabIndex = 0;
  }

  function offerData() {
    const data = document.getElementById("data");
    if (!data) return;
    const link = document.createElement("a");
    link.download = `${document.title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60)}.json`;
    link.href = URL.createObjectURL(new Blob([data.textContent], { type: "application/json" }));
    link.textContent = "The data behind this page (JSON)";
    document.getElementById("data-place").replaceChildren(link);
  }

  document.addEventListener("click", event => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.id === "theme") switchTheme();
    else if (button.matches("thead button")) startWithA(button.parentElement);
    else if (button.matches(".copy")) copyTable(button);
    else if (button.matches(".copy-text")) copy(button.closest("details").querySelector("code").textContent, "Text");
    else if (button.matches(".unsort")) unsort(button);
    else if (button.matches(".enlarge")) enlarge(button);
  }, { capture: true });
  document.addEventListener("sort-end", event => { partsOf(event.target).unsort.hidden = false; });

  document.addEventListener("DOMContentLoaded", () => {
    const contents = document.querySelector(".contents");
    const fold = () => { contents.open = !phone.matches; };
    fold();
    phone.addEventListener("change", fold);
    nameTheme();
    dark.addEventListener("change", nameTheme);
    offerData();
    const watch = new ResizeObserver(entries => entries.forEach(entry => fit(entry.target)));
    document.querySelectorAll(".scroll").forEach(region => watch.observe(region));
  });
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(details => { details.open = true; }));
})();
