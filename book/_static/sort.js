// Tables of the class "sortable": each heading becomes a button that sorts by its column. Numbers are sorted from the
// highest, words from A; another click turns the order round. Empty cells stay at the end.
document.addEventListener("DOMContentLoaded", () => {
  const textOf = (row, column) => row.cells[column].textContent.trim();
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const rows = [...table.tBodies[0].rows];
        const [empty, full] = [true, false].map((is) => rows.filter((row) => (textOf(row, column) === "") === is));
        const numbers = full.some((row) => !Number.isNaN(parseFloat(textOf(row, column))));
        const [usual, other] = numbers ? ["descending", "ascending"] : ["ascending", "descending"];
        const order = head.getAttribute("aria-sort") === usual ? other : usual;
        const sign = order === "ascending" ? 1 : -1;
        full.sort((a, b) => {
          const [one, two] = [a, b].map((row) => textOf(row, column));
          return sign * (numbers ? parseFloat(one) - parseFloat(two) : one.localeCompare(two));
        });
        heads.forEach((each) => each.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", order);
        table.tBodies[0].append(...full, ...empty);
      });
    });
  }
});
