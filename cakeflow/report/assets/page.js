(() => {
  "use strict";
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const words = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });

  // Numbers by size, texts by alphabet, what is missing last in either direction.
  const compare = (one, other, sign) => {
    if (one === other) return 0;
    if (one === "" || other === "") return one === "" ? 1 : -1;
    const [x, y] = [Number(one), Number(other)];
    return sign * (Number.isNaN(x) || Number.isNaN(y) ? words.compare(one, other) : x - y);
  };
  const valueOf = (cell) => (cell.dataset.value ?? cell.textContent).trim();

  for (const table of all("table.sortable")) {
    const heads = all("thead th", table);
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
        heads.forEach((each) => each.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
        const body = table.tBodies[0];
        const rows = [...body.rows].map((row) => [valueOf(row.cells[column]), row]);
        rows.sort(([one], [other]) => compare(one, other, sign));
        body.append(...rows.map(([, row]) => row));
      });
    });
  }

  const list = document.getElementById("edit-list");
  if (!list) return;
  const [controls, find, show, sort, count] = ["controls", "find", "show", "sort", "count"].map((name) =>
    document.getElementById(`edit-${name}`)
  );
  const edits = [...list.children].map((item) => ({
    item,
    details: item.querySelector("details"),
    text: all(".fact, .relation", item).map((part) => part.textContent.toLowerCase()).join(" "),
  }));
  controls.hidden = false;
  controls.addEventListener("submit", (event) => event.preventDefault());

  const filter = () => {
    const terms = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let visible = 0;
    for (const { item, text } of edits) {
      const fails = !show.value || Number(item.dataset[show.value] ?? 1) < 1;
      item.hidden = !(fails && terms.every((word) => text.includes(word)));
      visible += !item.hidden;
    }
    count.textContent = `${visible} of ${edits.length} edits`;
  };
  const order = () => {
    const [key, down] = sort.value.split(" ");
    const sign = down ? -1 : 1;
    edits.sort(
      (one, other) =>
        compare(one.item.dataset[key] ?? "", other.item.dataset[key] ?? "", sign) ||
        one.item.dataset.number - other.item.dataset.number
    );
    list.replaceChildren(); // taking thousands out one by one, from the front, is slow
    list.append(...edits.map(({ item }) => item));
  };
  const toggle = (open) => edits.forEach(({ item, details }) => (details.open = item.hidden ? details.open : open));

  find.addEventListener("input", filter);
  show.addEventListener("change", filter);
  sort.addEventListener("change", order);
  document.getElementById("edit-open").addEventListener("click", () => toggle(true));
  document.getElementById("edit-close").addEventListener("click", () => toggle(false));
})();
