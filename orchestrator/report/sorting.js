for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows].at(-1).querySelectorAll("th");
  heads.forEach((head, column) => {
    head.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = table.tBodies[0];
      const key = (row) => row.cells[column].textContent.trim();
      const number = (text) => (/^[-+]?[0-9]/.test(text) ? parseFloat(text) : NaN);
      const order = (a, b) => {
        const x = number(key(a)), y = number(key(b));
        if (Number.isNaN(x) || Number.isNaN(y)) {
          if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1;
          return (down ? -1 : 1) * key(b).localeCompare(key(a));
        }
        return down ? y - x : x - y;
      };
      [...body.rows].sort(order).forEach((row) => body.append(row));
    });
  });
}
