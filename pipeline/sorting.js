// Sorts a table by the column whose heading is pressed, and pressed again the other way round.
// A cell that holds no number comes last either way.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const number = (cell) =>
    parseFloat(cell.textContent.trim().replaceAll(",", "").replace("±", "").replace("−", "-"));
  const words = (cell) => cell.textContent.trim();
  heads.forEach((head, column) => {
    if (head.ariaHidden === "true") return;
    // Not a <button>: printed, those are left out of a heading that is repeated on the next sheet.
    const button = document.createElement("span");
    button.role = "button";
    button.tabIndex = 0;
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      button.click();
    });
    button.addEventListener("click", () => {
      const down = head.ariaSort === "ascending";
      const text = head.classList.contains("text");
      const compare = (a, b) => {
        if (text) return words(a).localeCompare(words(b), undefined, { numeric: true });
        return number(a) - number(b);
      };
      const rows = [...body.rows];
      const known = rows.filter((row) => text || !isNaN(number(row.cells[column])));
      known.sort((a, b) => (down ? -1 : 1) * compare(a.cells[column], b.cells[column]));
      body.append(...known, ...rows.filter((row) => !known.includes(row)));
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
    });
  });
}
